// Backward: the sums of g and g * xhat, and the gradients of input and residual; g, the gradient of
// the activation's argument, is made from dy on the way.
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

// Where the reducing kernel keeps the constants of z: with many channels per thread its sums and
// the vectors under way take the registers.
template <typename V>
using AffinesOf = std::conditional_t<V::kMapping != Mapping::ChannelsFirst && V::kWidth != 1,
                                     AffineInShared<V>, AffineInRegisters<V>>;

// Formula    sum(g) and sum(g * (x - mean)) * rstd: dbias and dweight, with g = dy * act'(z),
//            z = fma(x - mean, weight * rstd, bias) + residual
//            (Ioffe and Szegedy 2015, arXiv:1502.03167)
// Shapes     dy, x, residual [N, C, S] in one layout; statistics, parameters and results [C];
//            mask: mask.h
// Mapping    plan.h; the last block of a tile to arrive merges the chunks
// Bytes      reads dy and x once, and the residual or, in its place, the mask
// Numerics   g, products and sums of four in the accumulation type, also for 16-bit data; the rest
//            in double. A thread whose sums are not finite gathers them again in double.
// Requires   semaphores that are 0, and of nobody else until the launch is over; a mask only with a
//            piecewise linear act
template <typename V>
__global__ void __launch_bounds__(kThreads, 2) backward_reduce_kernel(BackwardReduceParams p) {
  using T = typename V::T;
  using A = Acc<T>;
  using Iterator = TileIterator<V::kWidth, V::kMapping>;
  const T* dy = static_cast<const T*>(p.dy);
  const T* x = static_cast<const T*>(p.x);
  const T* residual = static_cast<const T*>(p.epilogue.residual);
  const bool masked = p.mask.bytes != nullptr;
  // Made anew where it is asked for: kept, it would take the registers of the sums.
  const auto start = [&] { return Iterator(p.shape, p.plan, blockIdx.x); };
  constexpr int kChannels = Iterator::kChannels;
  constexpr int kPerVector = V::kWidth / kChannels;  // values of one channel in a vector
  static_assert(kBatch * kPerVector % 4 == 0, "a full batch leaves nothing to add");
  const AffinesOf<V> affines(p, start(),
                             reduce_shared_bytes(V::kMapping, Iterator::channels_of_tile(p.plan)));
  Pair sum[kChannels];  // of g and g * (x - mean)
  // Adds up every vector of the walk: add(u, g, x) for number u of a batch, done(valid) after it.
  const auto gather = [&](auto add, auto done) {
#pragma unroll
    for (int k = 0; k < kChannels; ++k) sum[k] = {0, 0};
    Iterator it = start();
    MaskCursor<const uint8_t, V::kWidth, V::kMapping> mask(p.mask, p.plan, it);
    it.batches(p.plan, [&](const int64_t (&at)[kBatch], int valid) {
      const unsigned mask_bits = masked ? mask.read(valid) : 0;
      Values<T, V::kWidth> dy_vec[kBatch], x_vec[kBatch];
#pragma unroll
      for (int u = 0; u < kBatch; ++u) {
        if (u >= valid) continue;
        dy_vec[u].load(dy + at[u]);
        x_vec[u].load(x + at[u]);
      }
#pragma unroll
      for (int u = 0; u < kBatch; ++u) {
        if (u >= valid) break;
        Values<T, V::kWidth> residual_vec;
        if (residual != nullptr) residual_vec.load(residual + at[u]);
        A g[V::kWidth];
        forget_loads();
        epilogue_backward(p.epilogue, masked, mask_bits >> u * kByteBits, affines, dy_vec[u],
                          x_vec[u], residual_vec, g);
        forget_loads();
        add(u, g, x_vec[u]);
      }
      done(valid);
    });
  };
  A g_of_4[kChannels] = {}, dot_of_4[kChannels] = {};
  const auto flush = [&](int k) {
    sum[k].a += g_of_4[k];
    sum[k].b += dot_of_4[k];
    g_of_4[k] = dot_of_4[k] = 0;
  };
  gather(
      [&](int u, const A(&g)[V::kWidth], const Values<T, V::kWidth>& x_vec) {
#pragma unroll
        for (int v = 0; v < V::kWidth; ++v) {
          const int k = v % kChannels;
          g_of_4[k] += g[v];
          dot_of_4[k] = fma(g[v], x_vec[v] - affines[k].mean, dot_of_4[k]);
          if ((u * kPerVector + v / kChannels) % 4 == 3) flush(k);
        }
      },
      [&](int valid) {
        if (valid == kBatch) return;
#pragma unroll
        for (int k = 0; k < kChannels; ++k) flush(k);
      });
  bool finite = true;
#pragma unroll
  for (int k = 0; k < kChannels; ++k) finite = finite && is_finite(sum[k].a) && is_finite(sum[k].b);
  if (!finite) {
    // Data that is not finite, or that exceeds float's range in between although the result fits.
    gather(
        [&](int, const A(&g)[V::kWidth], const Values<T, V::kWidth>& x_vec) {
#pragma unroll
          for (int v = 0; v < V::kWidth; ++v) {
            const int k = v % kChannels;
            const double wide_g = g[v];
            sum[k].a += wide_g;
            sum[k].b += wide_g * (static_cast<double>(x_vec[v]) - affines[k].mean);
          }
        },
        [](int) {});
  }

  Pair total;
  if (!tile_sum(sum, start(), p.plan, p.shape, p.staging, &total)) return;
  const int channels = Iterator::channels_of_tile(p.plan), i = static_cast<int>(threadIdx.x);
  const int64_t c = start().tile * channels + i;
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

// Formula    dresidual = g = dy * act'(z), z = fma(x - mean, weight * rstd, bias) + residual;
//            dx = ((g - mean_dy) - (x - mean) * (rstd * mean_dy_xhat)) * (weight * rstd);
//            where the statistics are constants (inference) dx = g * (weight * rstd)
// Shapes     dy, x, residual, dx, dresidual [N, C, S] in one layout; statistics, parameters and
//            means [C]; mask: mask.h
// Mapping    plan.h, blocks in reverse order: what the reduce kernel read last is still in L2
// Bytes      reads dy, x and the residual or, in its place, the mask; writes dx and dresidual, what
//            is asked for. Where the statistics are constants x is read for z alone, which neither
//            a mask nor the identity needs.
// Numerics   in the accumulation type, each result rounded once
// Requires   a mask only with a piecewise linear act
template <typename V>
__global__ void __launch_bounds__(kThreads, 2) backward_apply_kernel(BackwardApplyParams p) {
  using T = typename V::T;
  using A = Acc<T>;
  const T* dy = static_cast<const T*>(p.dy);
  const T* x = static_cast<const T*>(p.x);
  const T* residual = static_cast<const T*>(p.epilogue.residual);
  T* dx = static_cast<T*>(p.dx);
  T* dresidual = static_cast<T*>(p.dresidual);
  using Iterator = TileIterator<V::kWidth, V::kMapping>;
  constexpr int kChannels = Iterator::kChannels;
  Iterator it(p.shape, p.plan, gridDim.x - 1 - blockIdx.x);
  const bool constant_statistics = p.mean_dy == nullptr, masked = p.mask.bytes != nullptr;
  const bool needs_x = !constant_statistics || (p.epilogue.act != Activation::Identity && !masked);
  if (it.remaining == 0) return;
  MaskCursor<const uint8_t, V::kWidth, V::kMapping> mask(p.mask, p.plan, it);
  const AffineInRegisters<V> affines(p, it);
  const PerChannel<A, Iterator> mean_dy(it.split_of_vector(), [&](int k) -> A {
    return constant_statistics ? 0 : load_one(static_cast<const A*>(p.mean_dy) + it.channel_of(k));
  });
  const PerChannel<A, Iterator> proj_scale(it.split_of_vector(), [&](int k) -> A {
    const int64_t c = it.channel_of(k);
    return constant_statistics ? 0
                               : MeanRstd<A>(p.statistics, c).rstd *
                                     load_one(static_cast<const A*>(p.mean_dy_xhat) + c);
  });
  it.batches(p.plan, [&](const int64_t (&at)[kBatch], int valid) {
    const unsigned mask_bits = masked ? mask.read(valid) : 0;
    Values<T, V::kWidth> dy_vec[kBatch], x_vec[kBatch], residual_vec[kBatch];
#pragma unroll
    for (int u = 0; u < kBatch; ++u) {
      if (u >= valid) continue;
      dy_vec[u].load(dy + at[u]);
      if (needs_x) x_vec[u].load(x + at[u]);
      if (residual != nullptr) residual_vec[u].load(residual + at[u]);
    }
#pragma unroll
    for (int u = 0; u < kBatch; ++u) {
      if (u >= valid) break;
      A g[V::kWidth];
      epilogue_backward(p.epilogue, masked, mask_bits >> u * kByteBits, affines, dy_vec[u],
                        x_vec[u], residual_vec[u], g);
      Values<T, V::kWidth> rounded;
      if (dresidual != nullptr) {
#pragma unroll
        for (int v = 0; v < V::kWidth; ++v) rounded.set(v, g[v]);
        rounded.store(dresidual + at[u]);
      }
      if (dx == nullptr) continue;
#pragma unroll
      for (int v = 0; v < V::kWidth; ++v) {
        const int k = v % kChannels;
        A d = g[v];
        if (!constant_statistics) {
          d = (d - mean_dy[k]) - (x_vec[u][v] - affines[k].mean) * proj_scale[k];
        }
        rounded.set(v, d * affines[k].scale);
      }
      rounded.store(dx + at[u]);
    }
  });
}

}  // namespace

cudaError_t launch_backward_reduce(const BackwardReduceParams& p, cudaStream_t stream) {
  return with_variant(p.dtype, p.plan, [&](auto variant) {
    using V = decltype(variant);
    const int shared = reduce_shared_bytes(p.plan);
    return launch(backward_reduce_kernel<V>, p, p.plan.blocks(), shared + AffinesOf<V>::kBytes,
                  stream);
  });
}

cudaError_t launch_backward_apply(const BackwardApplyParams& p, cudaStream_t stream) {
  return with_variant(p.dtype, p.plan, [&](auto variant) {
    return launch(backward_apply_kernel<decltype(variant)>, p, p.plan.blocks(), 0, stream);
  });
}

}  // namespace cuda
}  // namespace bnorm_ext
