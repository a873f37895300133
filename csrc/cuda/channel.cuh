// What kernels do once per channel: reading parameters of any dtype, statistics, running
// statistics.
#pragma once

#include "../variance.h"
#include "params.h"
#include "vec.cuh"

namespace bnorm_ext {
namespace cuda {

__device__ __forceinline__ double get(const ChannelVector& v, int64_t c) {
  const int64_t i = c * v.stride;
  switch (v.dtype) {
    case DType::Float:
      return load_one(static_cast<const float*>(v.data) + i);
    case DType::Double:
      return load_one(static_cast<const double*>(v.data) + i);
    case DType::Half:
      return load_one(static_cast<const c10::Half*>(v.data) + i);
    default:
      return load_one(static_cast<const c10::BFloat16*>(v.data) + i);
  }
}

__device__ __forceinline__ void set(const ChannelVector& v, int64_t c, double value) {
  const int64_t i = c * v.stride;
  switch (v.dtype) {
    case DType::Float:
      return store_one(static_cast<float*>(v.data) + i, static_cast<float>(value));
    case DType::Double:
      return store_one(static_cast<double*>(v.data) + i, value);
    case DType::Half:
      return store_one(static_cast<c10::Half*>(v.data) + i, static_cast<float>(value));
    default:
      return store_one(static_cast<c10::BFloat16*>(v.data) + i, static_cast<float>(value));
  }
}

// Starts to load the values of channel c that were given, so that loads which wait for one after the
// other have to wait for memory once.
template <typename... Vectors>
__device__ __forceinline__ void prefetch_channel(int64_t c, const Vectors&... vectors) {
  const auto one = [&](const ChannelVector& v) {
    const int bytes = v.dtype == DType::Double ? 8 : v.dtype == DType::Float ? 4 : 2;
    if (v.data != nullptr) prefetch(static_cast<const char*>(v.data) + c * v.stride * bytes);
  };
  (one(vectors), ...);
}

// The first value of channel c.
template <typename T>
__device__ __forceinline__ const T* first_of_channel(const void* x, const Shape& shape, int64_t c) {
  return static_cast<const T*>(x) + (shape.layout == Layout::ChannelsLast ? c : c * shape.S);
}

// A parameter in the accumulation type, or `otherwise` where it was not given.
template <typename A>
__device__ __forceinline__ A get_or(const ChannelVector& v, int64_t c, A otherwise) {
  return v.data == nullptr ? otherwise : static_cast<A>(get(v, c));
}

// In double until the last step, like PyTorch's own batch norm.
template <typename A>
__device__ __forceinline__ A rstd_of(double var, double eps) {
  return static_cast<A>(1.0 / sqrt(var + eps));
}

template <typename A>
struct MeanRstd {
  A mean, rest, rstd;
  __device__ __forceinline__ MeanRstd(const Statistics& s, int64_t c)
      : mean(static_cast<A>(get(s.mean, c))),
        rest(get_or(s.rest, c, A{0})),
        rstd(s.is_rstd ? static_cast<A>(get(s.var, c)) : rstd_of<A>(get(s.var, c), s.eps)) {}
};

// Writes a mean to where mean_like in ../tensors.h says: [2, C].
template <typename A>
__device__ __forceinline__ void store_mean(void* mean, int64_t C, int64_t c,
                                           const SplitMean<A>& split) {
  store_one(static_cast<A*>(mean) + c, split.mean);
  store_one(static_cast<A*>(mean) + C + c, split.rest);
}

// The biased variance of 1 / per_value values, of which `sums` holds the sums of the deviations from
// any anchor and of their squares.
__device__ __forceinline__ double variance_of(const Pair& sums, double per_value) {
  return clamp_variance((sums.b - sums.a * (sums.a * per_value)) * per_value);
}

// Moves the running statistics of channel c towards those of a batch of `count` values per channel.
// In double, whatever the dtype of the buffers.
__device__ __forceinline__ void update_running(const RunningUpdate& running, int64_t c, double mean,
                                               double var, double count) {
  if (running.mean.data == nullptr) return;
  const double m = running.cumulative ? 1.0 / static_cast<double>(*running.num_batches_tracked + 1)
                                      : running.momentum;
  const double unbiased = var * (count / (count - 1));
  set(running.mean, c, m * mean + (1 - m) * get(running.mean, c));
  set(running.var, c, m * unbiased + (1 - m) * get(running.var, c));
}

}  // namespace cuda
}  // namespace bnorm_ext
