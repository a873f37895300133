// Backward in two passes: the sums of g and g * xhat, then the gradients of input and residual. g,
// the gradient of the activation's argument, is computed from dy in both.
#include "backward.cuh"
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

// Where the reducing kernel keeps the constants of z: in shared memory where a thread has many
// channels, because their sums and the vectors being loaded need the registers.
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
//            in double. A thread whose sums are not finite computes them again in double.
// Requires   semaphores that are 0 and that nobody else uses until the launch is over; a mask only
//            with a piecewise linear act
template <typename V>
__global__ void __launch_bounds__(kThreads, 2) backward_reduce_kernel(BackwardReduceParams p) {
  using T = typename V::T;
  using A = Acc<T>;
  using Iterator = TileIterator<V::kWidth, V::kMapping>;
  const T* dy = static_cast<const T*>(p.dy);
  const T* x = static_cast<const T*>(p.x);
  const T* residual = static_cast<const T*>(p.epilogue.residual);
  const bool masked = p.mask.bytes != nullptr;
  // Rebuilt on demand, which leaves registers for the sums.
  const auto start = [&] { return Iterator(p.shape, p.plan, blockIdx.x); };
  const AffinesOf<V> affines(p, start(),
                             reduce_shared_bytes(V::kMapping, Iterator::channels_of_tile(p.plan)));
  GradientSums<V> sums;
  sums.add_all(affines, [&](auto f, auto end_batch) {
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
        f(u, g, x_vec[u], at[u]);
      }
      end_batch(valid);
    });
  });

  Pair total;
  if (!tile_sum(sums.sum, start(), p.plan, p.shape, p.staging, &total)) return;
  const int channels = Iterator::channels_of_tile(p.plan), i = static_cast<int>(threadIdx.x);
  const int64_t c = start().tile * channels + i;
  if (i >= channels || c >= p.shape.C) return;
  const ChannelGradients<A> gradients(p, c, total);
  gradients.write_sums(p, c);
  if (p.mean_dy != nullptr) store_one(static_cast<A*>(p.mean_dy) + c, gradients.mean_dy);
  if (p.mean_dy_xhat != nullptr) {
    store_one(static_cast<A*>(p.mean_dy_xhat) + c, gradients.mean_dy_xhat);
  }
}

// Formula    dresidual = g = dy * act'(z), z = fma(x - mean, weight * rstd, bias) + residual;
//            dx = ((g - mean_dy) - (x - mean) * (rstd * mean_dy_xhat)) * (weight * rstd);
//            where the statistics are constants (inference) dx = g * (weight * rstd)
// Shapes     dy, x, residual, dx, dresidual [N, C, S] in one layout; statistics, parameters and
//            means [C]; mask: mask.h
// Mapping    plan.h, blocks in reverse order: what the reducing kernel read last is still in L2
// Bytes      reads dy, x and the residual or, in its place, the mask; writes dx and dresidual, as
//            asked for, where plan.evict_first so that they do not drive dy and x out of the L2.
//            Where the statistics are constants x is read for z alone, which neither a mask nor the
//            identity needs.
// Numerics   in the accumulation type, each result rounded once
// Requires   a mask only with a piecewise linear act
template <typename V>
__global__ void __launch_bounds__(kThreads, 2) backward_apply_kernel(BackwardApplyParams p) {
  using T = typename V::T;
  using A = Acc<T>;
  const T* dy = static_cast<const T*>(p.dy);
  const T* x = static_cast<const T*>(p.x);
  const T* residual = static_cast<const T*>(p.epilogue.residual);
  TileIterator<V::kWidth, V::kMapping> it(p.shape, p.plan, gridDim.x - 1 - blockIdx.x);
  const bool constant_statistics = p.mean_dy == nullptr, masked = p.mask.bytes != nullptr;
  const bool needs_x = !constant_statistics || (p.epilogue.act != Activation::Identity && !masked);
  if (it.remaining == 0) return;
  MaskCursor<const uint8_t, V::kWidth, V::kMapping> mask(p.mask, p.plan, it);
  const AffineInRegisters<V> affines(p, it);
  const GradientWriter<V> gradients(
      p, constant_statistics, p.plan.evict_first, it,
      [&](int k) -> A {
        return constant_statistics ? 0
                                   : load_one(static_cast<const A*>(p.mean_dy) + it.channel_of(k));
      },
      [&](int k) -> A {
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
      gradients.write(affines, g, x_vec[u], at[u]);
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
