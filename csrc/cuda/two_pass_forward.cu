// Forward in two passes: the statistics of a batch, then the normalisation by known statistics.
#include "channel.cuh"
#include "epilogue.cuh"
#include "kernels.h"
#include "launch.cuh"
#include "mask.cuh"
#include "reduce.cuh"
#include "tile_iterator.cuh"

namespace bnorm_ext {
namespace cuda {
namespace {

// A thread's sums of x - anchor and of its square, one pair per channel.
//
// A batch of values in registers is summed twice: for its mean, in the accumulation type, then for
// the deviations from that mean, whose sum corrects the rounding of the mean. So nothing cancels,
// however large the mean. The batches are added in double, relative to an anchor that lies between
// the channel's smallest and largest value. Such an anchor is within sqrt(count) standard
// deviations of the mean (Samuelson's inequality), so that the squares lose at most log2(count) of
// 53 bits, and one or two bits unless the anchor is far from the mean.
template <typename V>
struct MomentSums {
  using T = typename V::T;
  using A = Acc<T>;
  using Batch = Values<T, V::kWidth>[kBatch];
  static constexpr int kChannels = TileIterator<V::kWidth, V::kMapping>::kChannels;
  static constexpr int kPerVector = V::kWidth / kChannels;  // values of one channel in a vector
  static constexpr int kValues = kBatch * kPerVector;       // and in a batch

  A anchor[kChannels];
  Pair sum[kChannels];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int k = 0; k < kChannels; ++k) sum[k] = {0, 0};
  }

  __device__ __forceinline__ void add(const Batch& values, int valid) {
    const int count = valid * kPerVector;
    const A per_count = A{1} / static_cast<A>(count);
#pragma unroll
    for (int k = 0; k < kChannels; ++k) {
      A total = 0;
#pragma unroll
      for (int i = 0; i < kValues; ++i) {
        if (i < count) total += values[i / kPerVector][k * kPerVector + i % kPerVector];
      }
      const A mean = total * per_count;
      double d = 0, d2 = 0;
#pragma unroll
      for (int begin = 0; begin < kValues; begin += 4) {
        A d_of_4 = 0, d2_of_4 = 0;
#pragma unroll
        for (int i = begin; i < begin + 4; ++i) {
          const A value = values[i / kPerVector][k * kPerVector + i % kPerVector];
          const A deviation = i < count ? value - mean : A{0};
          d_of_4 += deviation;
          d2_of_4 = fma(deviation, deviation, d2_of_4);
        }
        d += d_of_4;
        d2 += d2_of_4;
      }
      const double shift = static_cast<double>(mean) - anchor[k];
      sum[k].a += count * shift + d;
      sum[k].b += d2 + shift * (2 * d + count * shift);
    }
  }

  // Where this is false everything is summed again in double: either the data is not finite, or
  // float overflowed although the result fits.
  __device__ __forceinline__ bool finite() const {
    bool all = true;
#pragma unroll
    for (int k = 0; k < kChannels; ++k) all = all && is_finite(sum[k].b);
    return all;
  }
  __device__ __forceinline__ void add_in_double(const Values<T, V::kWidth>& value) {
#pragma unroll
    for (int v = 0; v < V::kWidth; ++v) {
      const double deviation = static_cast<double>(value[v]) - anchor[v % kChannels];
      sum[v % kChannels].a += deviation;
      sum[v % kChannels].b += deviation * deviation;
    }
  }
};

// The anchor of channel c: its first value, or for double data, where every bit of the sums counts,
// the mean of several values spread over the channel. 0 where that is not finite.
template <typename T>
__device__ __forceinline__ double anchor_of(const StatisticsParams& p, int64_t c) {
  const Shape& shape = p.shape;
  const int64_t count = shape.N * shape.S;
  int64_t samples = sizeof(T) == sizeof(double) ? 8 : 1;
  if (samples > count) samples = count;
  double total = 0;
  for (int64_t i = 0; i < samples; ++i) {
    const int64_t at = i * (count / samples), n = at / shape.S, s = at - n * shape.S;
    total += load_one(static_cast<const T*>(p.x) + (shape.layout == Layout::ChannelsLast
                                                        ? at * shape.C + c
                                                        : (n * shape.C + c) * shape.S + s));
  }
  const double value = total / static_cast<double>(samples);
  return is_finite(value) ? value : 0;
}

// Formula    mean = sum(x) / n, var = sum((x - mean)^2) / n, rstd = 1 / sqrt(var + eps), with
//            n = N * S; running_mean and running_var moved towards mean and var * n / (n - 1)
//            (Ioffe and Szegedy 2015, arXiv:1502.03167)
// Shapes     x [N, C, S] in either layout; results [C]
// Mapping    plan.h; the last block of a tile to arrive merges the chunks
// Bytes      reads x once
// Numerics   MomentSums above; merged in double
// Requires   semaphores that are 0 and that nobody else uses until the launch is over
template <typename V>
__global__ void __launch_bounds__(kThreads, 2) statistics_kernel(StatisticsParams p) {
  using T = typename V::T;
  using A = Acc<T>;
  const T* x = static_cast<const T*>(p.x);
  // Rebuilt on demand, which leaves registers for the sums.
  const auto start = [&] {
    return TileIterator<V::kWidth, V::kMapping>(p.shape, p.plan, blockIdx.x);
  };
  auto it = start();
  MomentSums<V> moments;
#pragma unroll
  for (int k = 0; k < it.kChannels; ++k) {
    moments.anchor[k] =
        it.channel < p.shape.C ? static_cast<A>(anchor_of<T>(p, it.channel_of(k))) : A{0};
  }
  moments.clear();
  it.batches(p.plan, [&](const int64_t (&at)[kBatch], int valid) {
    Values<T, V::kWidth> x_vec[kBatch];
#pragma unroll
    for (int u = 0; u < kBatch; ++u) {
      if (u < valid) x_vec[u].load(x + at[u]);
    }
    moments.add(x_vec, valid);
  });
  if (!moments.finite()) {
    moments.clear();
    for (auto again = start(); again.remaining > 0; again.advance(p.plan)) {
      Values<T, V::kWidth> value;
      value.load(x + again.offset);
      moments.add_in_double(value);
    }
  }

  Pair total;
  if (!tile_sum(moments.sum, start(), p.plan, p.shape, p.staging, &total)) return;
  const int channels = it.channels_of_tile(p.plan), i = static_cast<int>(threadIdx.x);
  const int64_t c = start().tile * channels + i;
  if (i >= channels || c >= p.shape.C) return;
  const double n = static_cast<double>(p.shape.N * p.shape.S);
  const double mean = anchor_of<T>(p, c) + total.a / n, var = variance_of(total, n);
  if (p.mean != nullptr) store_one(static_cast<A*>(p.mean) + c, static_cast<A>(mean));
  if (p.rstd != nullptr) store_one(static_cast<A*>(p.rstd) + c, rstd_of<A>(var, p.eps));
  if (p.wide_mean != nullptr) store_one(p.wide_mean + c, mean);
  if (p.wide_var != nullptr) store_one(p.wide_var + c, var);
  update_running(p.running, c, mean, var, n);
}

// Formula    y = act(z), z = fma(x - mean, weight * rstd, bias) + residual; where a mask is asked
//            for, its bits are passes_gradient(act, z)
// Shapes     x, y, residual [N, C, S] in one layout; statistics, weight and bias [C]; mask: mask.h
// Mapping    plan.h, blocks in reverse order: what the statistics kernel read last is still in L2
// Bytes      reads x and residual, writes y (where plan.evict_first so that it does not drive x out
//            of the L2) and the mask, an eighth of a byte per element
// Numerics   in the accumulation type, rounded once
// Requires   a mask only with a piecewise linear act
template <typename V>
__global__ void __launch_bounds__(kThreads, 2) normalise_kernel(NormaliseParams p) {
  using T = typename V::T;
  const T* x = static_cast<const T*>(p.x);
  T* y = static_cast<T*>(p.y);
  TileIterator<V::kWidth, V::kMapping> it(p.shape, p.plan, gridDim.x - 1 - blockIdx.x);
  if (p.num_batches_tracked != nullptr && blockIdx.x == 0 && threadIdx.x == 0) {
    ++*p.num_batches_tracked;
  }
  // Lanes share the bytes of a mask: then all lanes of a warp iterate equally often.
  const bool writes_mask = p.mask.bytes != nullptr;
  if (!it.more(writes_mask)) return;
  MaskCursor<uint8_t, V::kWidth, V::kMapping> mask(p.mask, p.plan, it);
  const AffineInRegisters<V> affines(p, it);
  const T* residual = static_cast<const T*>(p.epilogue.residual);
  const auto normalise = [&](const int64_t (&at)[kBatch], int valid) {
    Values<T, V::kWidth> vec[kBatch], residual_vec[kBatch];  // vec: x, then y
#pragma unroll
    for (int u = 0; u < kBatch; ++u) {
      if (u >= valid) continue;
      vec[u].load(x + at[u]);
      if (residual != nullptr) residual_vec[u].load(residual + at[u]);
    }
    unsigned mask_bits = 0;
#pragma unroll
    for (int u = 0; u < kBatch; ++u) {
      if (u >= valid) break;
      mask_bits |= epilogue_forward(p.epilogue, writes_mask, affines, vec[u], residual_vec[u])
                   << (u * kByteBits);
      vec[u].store(y + at[u], p.plan.evict_first);
    }
    if (writes_mask) mask.write(mask_bits, valid);
  };
  it.batches(p.plan, normalise, writes_mask);
}

}  // namespace

cudaError_t launch_statistics(const StatisticsParams& p, cudaStream_t stream) {
  return with_variant(p.dtype, p.plan, [&](auto variant) {
    return launch(statistics_kernel<decltype(variant)>, p, p.plan.blocks(),
                  reduce_shared_bytes(p.plan), stream);
  });
}

cudaError_t launch_normalise(const NormaliseParams& p, cudaStream_t stream) {
  return with_variant(p.dtype, p.plan, [&](auto variant) {
    return launch(normalise_kernel<decltype(variant)>, p, p.plan.blocks(), 0, stream);
  });
}

}  // namespace cuda
}  // namespace bnorm_ext
