// What the host code of forward and backward does per channel: it reads and writes parameters, keeps
// coefficients for the kernels, updates running statistics. totals.h merges the results of chunks.
#pragma once

#include <ATen/ATen.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <cmath>

#include "../tensors.h"
#include "params.h"
#include "scratch.h"
#include "totals.h"

namespace bnorm_ext {
namespace cpu {

using at::Tensor;

inline double get(const ChannelVector& v, int64_t c) {
  const int64_t i = c * v.stride;
  switch (v.dtype) {
    case DType::Float:
      return static_cast<const float*>(v.data)[i];
    case DType::Double:
      return static_cast<const double*>(v.data)[i];
    case DType::Half:
      return static_cast<const c10::Half*>(v.data)[i];
    default:
      return static_cast<const c10::BFloat16*>(v.data)[i];
  }
}

inline void set(const ChannelVector& v, int64_t c, double value) {
  const int64_t i = c * v.stride;
  switch (v.dtype) {
    case DType::Float:
      static_cast<float*>(v.data)[i] = static_cast<float>(value);
      break;
    case DType::Double:
      static_cast<double*>(v.data)[i] = value;
      break;
    case DType::Half:
      static_cast<c10::Half*>(v.data)[i] = static_cast<float>(value);
      break;
    default:
      static_cast<c10::BFloat16*>(v.data)[i] = static_cast<float>(value);
  }
}

inline double get_or(const ChannelVector& v, int64_t c, double otherwise) {
  return v.data == nullptr ? otherwise : get(v, c);
}

// [C] arrays of the accumulation type, which threads fill channel by channel.
template <typename A>
class Coefficients {
 public:
  Coefficients(int64_t arrays, int64_t C) : C_(C), values_(arrays * C) {}
  A* operator[](int64_t i) { return values_.data() + i * C_; }

 private:
  int64_t C_;
  Scratch<A, 4 * 512> values_;
};

// Updates the running statistics with this batch: computed in double, whatever their dtype.
class RunningStatistics {
 public:
  RunningStatistics(const RunningUpdate& update, int64_t count)
      : update_(update), unbiased_(static_cast<double>(count) / static_cast<double>(count - 1)) {
    if (update_.cumulative) {
      update_.momentum = 1.0 / static_cast<double>(*update_.num_batches_tracked + 1);
    }
  }

  void update(int64_t c, double mean, double var) const {
    if (update_.mean.data == nullptr) return;
    const double m = update_.momentum;
    set(update_.mean, c, m * mean + (1 - m) * get(update_.mean, c));
    set(update_.var, c, m * (var * unbiased_) + (1 - m) * get(update_.var, c));
  }

  void count_batch() const {
    if (update_.num_batches_tracked != nullptr) ++*update_.num_batches_tracked;
  }

 private:
  RunningUpdate update_;
  double unbiased_;  // n / (n - 1), from the biased to the unbiased variance
};

template <typename F>
auto with_accumulator(DType dtype, F f) {
  return dtype == DType::Double ? f(double{}) : f(float{});
}

template <typename A>
double rstd_of(double var, double eps) {
  return static_cast<A>(1.0 / std::sqrt(var + eps));
}

}  // namespace cpu
}  // namespace bnorm_ext
