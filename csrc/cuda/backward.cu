// Backward: the sums of dy and dy * xhat, and the gradient of the input.
#include "channel.cuh"
#include "kernels.h"
#include "launch.cuh"
#include "reduce.cuh"
#include "walk.cuh"

namespace bnorm_ext {
namespace cuda {
namespace {

// Formula    sum(dy) and sum(dy * (x - mean)) * rstd: dbias and dweight
//            (Ioffe and Szegedy 2015, arXiv:1502.03167)
// Shapes     dy, x [N, C, S] in one layout; statistics and results [C]
// Mapping    plan.h; the last block of a tile to arrive merges the chunks
// Bytes      reads dy and x once
// Numerics   products and sums of four in the accumulation type, also for 16-bit data; the rest in
//            double. A thread whose sums are not finite gathers them again in double.
// Requires   tickets that are 0, and of nobody else until the launch is over
template <typename V>
__global__ void __launch_bounds__(kThreads, 2) backward_reduce_kernel(BackwardReduceParams p) {
  using T = typename V::T;
  using A = Acc<T>;
  const T* dy = static_cast<const T*>(p.dy);
  const T* x = static_cast<const T*>(p.x);
  Walk<V::kWidth, V::kLast> walk(p.shape, p.plan, blockIdx.x);
  constexpr int kChannels = Walk<V::kWidth, V::kLast>::kChannels;
  constexpr int kPerVector = V::kWidth / kChannels;  // values of one channel in a vector
  constexpr int kValues = kBatch * kPerVector;       // and in a batch
  A mean[kChannels];
  Pair sum[kChannels];  // of dy and dy * (x - mean)
#pragma unroll
  for (int k = 0; k < kChannels; ++k) {
    sum[k] = {0, 0};
    mean[k] =
        walk.channel < p.shape.C ? static_cast<A>(get(p.statistics.mean, walk.channel + k)) : A{0};
  }
  walk.batches(p.plan, [&](const int64_t (&at)[kBatch], int valid) {
    Values<T, V::kWidth> g[kBatch], value[kBatch];
#pragma unroll
    for (int u = 0; u < kBatch; ++u) {
      if (u >= valid) continue;
      g[u].load(dy + at[u]);
      value[u].load(x + at[u]);
    }
    const int count = valid * kPerVector;
#pragma unroll
    for (int k = 0; k < kChannels; ++k) {
#pragma unroll
      for (int begin = 0; begin < kValues; begin += 4) {
        A g_of_4 = 0, dot_of_4 = 0;
#pragma unroll
        for (int i = begin; i < begin + 4; ++i) {
          if (i >= count) continue;
          const int u = i / kPerVector, v = k * kPerVector + i % kPerVector;
          g_of_4 += g[u][v];
          dot_of_4 = fma(g[u][v], value[u][v] - mean[k], dot_of_4);
        }
        sum[k].a += g_of_4;
        sum[k].b += dot_of_4;
      }
    }
  });
  bool finite = true;
#pragma unroll
  for (int k = 0; k < kChannels; ++k) finite = finite && is_finite(sum[k].a) && is_finite(sum[k].b);
  if (!finite) {
    // Data that is not finite, or that exceeds float's range in between although the result fits.
#pragma unroll
    for (int k = 0; k < kChannels; ++k) sum[k] = {0, 0};
    for (Walk<V::kWidth, V::kLast> again(p.shape, p.plan, blockIdx.x); again.remaining > 0;
         again.advance(p.plan)) {
      Values<T, V::kWidth> g, value;
      g.load(dy + again.offset);
      value.load(x + again.offset);
#pragma unroll
      for (int v = 0; v < V::kWidth; ++v) {
        const int k = v % kChannels;
        const double wide_g = g[v];
        sum[k].a += wide_g;
        sum[k].b += wide_g * (static_cast<double>(value[v]) - mean[k]);
      }
    }
  }

  Pair total;
  if (!tile_sum(sum, walk, p.plan, p.exchange, &total)) return;
  const int channels = p.plan.columns * kChannels, i = static_cast<int>(threadIdx.x);
  const int64_t c = walk.tile * channels + i;
  if (i >= channels || c >= p.shape.C) return;
  // The means are those of the sums that the caller sees.
  const double n = static_cast<double>(p.shape.N * p.shape.S);
  const double rstd = MeanRstd<A>(p.statistics, c).rstd;
  const A dy_sum = static_cast<A>(total.a), dy_xhat_sum = static_cast<A>(total.b * rstd);
  if (p.sum_dy.data != nullptr) set(p.sum_dy, c, dy_sum);
  if (p.sum_dy_xhat.data != nullptr) set(p.sum_dy_xhat, c, dy_xhat_sum);
  if (p.mean_dy != nullptr) {
    store_one(static_cast<A*>(p.mean_dy) + c, static_cast<A>(dy_sum / n));
  }
  if (p.mean_dy_xhat != nullptr) {
    store_one(static_cast<A*>(p.mean_dy_xhat) + c, static_cast<A>(dy_xhat_sum / n));
  }
}

// Formula    dx = ((dy - mean_dy) - (x - mean) * (rstd * mean_dy_xhat)) * (weight * rstd);
//            where the statistics are constants (inference) dx = dy * (weight * rstd)
// Shapes     dy, x, dx [N, C, S] in one layout; statistics, weight and means [C]
// Mapping    plan.h, blocks in reverse order: what the reduce kernel read last is still in L2
// Bytes      reads dy and x (constant statistics: dy), writes dx
// Numerics   in the accumulation type, rounded once
template <typename V>
__global__ void __launch_bounds__(kThreads, 2) backward_apply_kernel(BackwardApplyParams p) {
  using T = typename V::T;
  using A = Acc<T>;
  const T* dy = static_cast<const T*>(p.dy);
  const T* x = static_cast<const T*>(p.x);
  T* dx = static_cast<T*>(p.dx);
  Walk<V::kWidth, V::kLast> walk(p.shape, p.plan, gridDim.x - 1 - blockIdx.x);
  constexpr int kChannels = Walk<V::kWidth, V::kLast>::kChannels;
  const bool constant_statistics = p.mean_dy == nullptr;
  if (walk.remaining == 0) return;
  A mean[kChannels], mean_dy[kChannels], slope[kChannels], scale[kChannels];
#pragma unroll
  for (int k = 0; k < kChannels; ++k) {
    const int64_t c = walk.channel + k;
    const MeanRstd<A> statistics(p.statistics, c);
    mean[k] = statistics.mean;
    scale[k] = get_or(p.weight, c, A{1}) * statistics.rstd;
    mean_dy[k] = slope[k] = 0;
    if (!constant_statistics) {
      mean_dy[k] = load_one(static_cast<const A*>(p.mean_dy) + c);
      slope[k] = statistics.rstd * load_one(static_cast<const A*>(p.mean_dy_xhat) + c);
    }
  }
  walk.batches(p.plan, [&](const int64_t (&at)[kBatch], int valid) {
    Values<T, V::kWidth> g[kBatch], value[kBatch];
#pragma unroll
    for (int u = 0; u < kBatch; ++u) {
      if (u >= valid) continue;
      g[u].load(dy + at[u]);
      if (!constant_statistics) value[u].load(x + at[u]);
    }
#pragma unroll
    for (int u = 0; u < kBatch; ++u) {
      if (u >= valid) break;
#pragma unroll
      for (int v = 0; v < V::kWidth; ++v) {
        const int k = v % kChannels;
        if (constant_statistics) {
          g[u].set(v, g[u][v] * scale[k]);
        } else {
          g[u].set(v, ((g[u][v] - mean_dy[k]) - (value[u][v] - mean[k]) * slope[k]) * scale[k]);
        }
      }
      g[u].store(dx + at[u]);
    }
  });
}

}  // namespace

cudaError_t launch_backward_reduce(const BackwardReduceParams& p, cudaStream_t stream) {
  return with_variant(p.dtype, p.plan, p.shape.layout, [&](auto variant) {
    return launch(backward_reduce_kernel<decltype(variant)>, p, p.plan.blocks(),
                  reduce_shared_bytes(p.plan, p.shape.layout), stream);
  });
}

cudaError_t launch_backward_apply(const BackwardApplyParams& p, cudaStream_t stream) {
  return with_variant(p.dtype, p.plan, p.shape.layout, [&](auto variant) {
    return launch(backward_apply_kernel<decltype(variant)>, p, p.plan.blocks(), 0, stream);
  });
}

}  // namespace cuda
}  // namespace bnorm_ext
