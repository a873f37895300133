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

// Formula    sum(g) and sum(g * (x - mean)) * rstd: dbias and dweight, with g = dy * act'(z),
//            z = fma(x - mean, weight * rstd, bias) + residual
//            (Ioffe and Szegedy 2015, arXiv:1502.03167)
// Shapes     dy, x, residual [N, C, S] in one layout; statistics, parameters and results [C];
//            mask: mask.h
// Mapping    plan.h; the last blocks of a tile to arrive merge the chunks (reduce.cuh)
// Bytes      reads dy and x once, and the residual or, in its place, the mask
// Numerics   g, products and sums of a run in the accumulation type, also for 16-bit data; the rest
//            in double. A thread whose sums are not finite computes them again in double.
// Requires   semaphores that are 0 and that nobody else uses until the launch is over; a mask only
//            with a piecewise linear act
template <typename V>
__global__ void __launch_bounds__(kThreads, kResident)
    backward_reduce_kernel(BackwardReduceParams p) {
  using T = typename V::T;
  using A = Acc<T>;
  using Iterator = TileIterator<V::kWidth, V::kMapping>;
  using Constants = Table<V, kAffineRows>;
  // Rebuilt on demand, which leaves registers for the sums.
  const auto start = [&] { return Iterator(p.shape, p.plan, blockIdx.x); };
  const Constants table(reduce_shared_bytes(V::kMapping, Iterator::channels_of_tile(p.plan)),
                        start());
  fill(table, p, p.plan, start());
  const MeanInRegisters<V, Constants> affines(table);
  GradientSums<V> sums;
  sums.add_all(affines, [&](auto f, auto end_run) {
    const Iterator it = start();
    const MaskCursor<const uint8_t, V::kWidth, V::kMapping> mask(p.mask, p.plan, it);
    for_each_gradient<V, V::kPlain, /*kLastTime=*/false>(it, p.plan, p, affines, mask, f, end_run);
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
__global__ void __launch_bounds__(kThreads, kResident)
    backward_apply_kernel(BackwardApplyParams p) {
  using T = typename V::T;
  using A = Acc<T>;
  using Iterator = TileIterator<V::kWidth, V::kMapping>;
  using Constants = TileTable<V>;
  const T* dy = static_cast<const T*>(p.dy);
  const T* x = static_cast<const T*>(p.x);
  const EpilogueParams epilogue = epilogue_of<V>(p.epilogue);
  const T* residual = static_cast<const T*>(epilogue.residual);
  const SecondPass<V> pass(p.shape, p.plan);
  const Iterator& it = pass.start;
  const bool constant_statistics = p.mean_dy == nullptr,
             masked = !V::kPlain && p.mask.bytes != nullptr;
  const bool needs_x = !constant_statistics || (epilogue.act != Activation::Identity && !masked);
  const Constants table(/*byte_offset=*/0, it);
  const int channels = Iterator::channels_of_tile(p.plan), i = static_cast<int>(threadIdx.x);
  const int64_t c = it.tile * channels + i;
  if (i < channels) {
    Projection<A> projection;
    if (!constant_statistics && c < p.shape.C) {
      projection = {MeanRstd<A>(p.statistics, c), load_one(static_cast<const A*>(p.mean_dy) + c),
                    load_one(static_cast<const A*>(p.mean_dy_xhat) + c)};
    }
    projection.set(table, i);
  }
  fill(table, p, p.plan, it);
  using Cursor = MaskCursor<const uint8_t, V::kWidth, V::kMapping>;
  Cursor mask = pass.of(Cursor(p.mask, p.plan, it));
  const MeanInRegisters<V, Constants> affines(table);
  const GradientWriter<V> gradients(p, constant_statistics, p.plan.evict_first, table);
  struct Loaded {
    Values<T, V::kWidth> dy[kHalf], x[kHalf], residual[kHalf];
  };
  Iterator walk = pass.it;
  walk.template pipelined<kHalf, true, Loaded>(
      pass.plan,
      [&](Loaded& loaded, const int64_t (&at)[kHalf], auto valid) {
#pragma unroll
        for (int u = 0; u < kHalf; ++u) {
          if (u >= valid) continue;
          loaded.dy[u].load(dy + at[u], /*evict_first=*/true);
          if (needs_x) loaded.x[u].load(x + at[u], /*evict_first=*/true);
          if (residual != nullptr) loaded.residual[u].load(residual + at[u], /*evict_first=*/true);
        }
      },
      [&](Loaded& loaded, const int64_t (&at)[kHalf], auto valid) {
        const unsigned mask_bits = masked ? mask.template read<kHalf>(valid) : 0;
#pragma unroll
        for (int u = 0; u < kHalf; ++u) {
          if (u >= valid) continue;
          A g[V::kWidth];
          epilogue_backward(epilogue, masked, mask_bits >> u * kByteBits, affines, loaded.dy[u],
                            loaded.x[u], loaded.residual[u], g);
          gradients.write(g, loaded.x[u], at[u]);
        }
      });
}

}  // namespace

cudaError_t launch_backward_reduce(const BackwardReduceParams& p, cudaStream_t stream) {
  return with_variant<8, true>(p.dtype, p.plan, is_plain(p), [&](auto variant) {
    using V = decltype(variant);
    const int shared = reduce_shared_bytes(p.plan);
    return launch(backward_reduce_kernel<V>, p, p.plan.blocks(),
                  shared + Table<V, kAffineRows>::kBytes, stream);
  });
}

cudaError_t launch_backward_apply(const BackwardApplyParams& p, cudaStream_t stream) {
  return with_variant<8, true>(p.dtype, p.plan, is_plain(p), [&](auto variant) {
    using V = decltype(variant);
    return launch(backward_apply_kernel<V>, p, p.plan.blocks(), TileTable<V>::kBytes, stream);
  });
}

}  // namespace cuda
}  // namespace bnorm_ext
