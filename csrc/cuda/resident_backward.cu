// Backward in one launch that reads dy and x once: a team of blocks keeps its tile of both on chip
// from the sums to dx.
#include "channel.cuh"
#include "epilogue.cuh"
#include "kernels.h"
#include "launch.cuh"
#include "mask.cuh"
#include "team.cuh"
#include "tile_iterator.cuh"

namespace bnorm_ext {
namespace cuda {
namespace {

// Formula    g = dy * act'(z), z = fma(x - mean, weight * rstd, bias) + residual; dresidual = g;
//            dbias = sum(g), dweight = sum(g * (x - mean)) * rstd; with both divided by n = N * S,
//            dx = ((g - mean_dy) - (x - mean) * (rstd * mean_dy_xhat)) * (weight * rstd);
//            where the statistics are constants (inference) dx = g * (weight * rstd)
//            (Ioffe and Szegedy 2015, arXiv:1502.03167)
// Shapes     dy, x, residual, dx, dresidual [N, C, S] in one layout; statistics, parameters and
//            their gradients [C]; mask: mask.h
// Mapping    plan.h: team b / chunks has tile b / chunks and, in a cooperative grid, every
//            `teams`-th after it; a thread's vectors are in its own slots of shared memory
// Bytes      reads dy and x once, the residual or, in its place, the mask twice; writes dx and
//            dresidual, where asked for
// Numerics   g, products and sums of four in the accumulation type, the rest in double; a thread
//            whose sums are not finite gathers them again in double. Results are rounded once.
// Requires   16- or 32-bit values; all blocks of a team resident at once; a mask only with a
// piecewise
//            linear act
template <typename V>
__global__ void __launch_bounds__(kThreads, kShares)
    resident_backward_kernel(ResidentBackwardParams p) {
  using T = typename V::T;
  using A = Acc<T>;
  using Iterator = TileIterator<V::kWidth, V::kMapping>;
  using Vector = Values<T, V::kWidth>;
  constexpr int kChannels = Iterator::kChannels;
  constexpr int kPerVector = V::kWidth / kChannels;  // values of one channel in a vector
  static_assert(TileTable<V>::kBytes <= kTableBytes, "of which the plan reserves room");
  const TilePlan& tile_plan = p.plan.tile_plan;
  const T* residual = static_cast<const T*>(p.epilogue.residual);
  T* dx = static_cast<T*>(p.dx);
  T* dresidual = static_cast<T*>(p.dresidual);
  const int channels = Iterator::channels_of_tile(tile_plan), t = static_cast<int>(threadIdx.x);
  const SharedLayout shared = shared_layout(V::kMapping, channels);
  const SmemVectors<T, V::kWidth> dy_smem(shared, p.plan, 0), x_smem(shared, p.plan, 1);
  const Team team(p.plan);
  const TileTable<V> table(shared.table, Iterator(p.shape, tile_plan, team.rank));
  const bool masked = p.mask.bytes != nullptr;
  int64_t round = 0;
  for (int64_t tile = team.number; tile < tile_plan.tiles; tile += p.plan.teams, ++round) {
    // Made anew where they are asked for: kept, they would take the registers of the sums.
    const auto start = [&] {
      return Iterator(p.shape, tile_plan, tile * tile_plan.chunks + team.rank);
    };
    dy_smem.fetch(start(), tile_plan, static_cast<const T*>(p.dy));
    x_smem.fetch(start(), tile_plan, static_cast<const T*>(p.x));
    async_commit();
    const auto channel = [&] { return tile * channels + t; };  // of thread t < channels
    if (t < channels) {
      Affine<A> affine = {};  // beyond the last channel too: threads read them, and write nothing
      if (channel() < p.shape.C) affine = {p.statistics, p.weight, p.bias, channel()};
      set(table, t, affine);
    }
    __syncthreads();
    async_wait<0>();
    // Calls f(u, g, x, dy, at) for vector u of each batch, done(valid) after it.
    const AffineInTable<TileTable<V>> affines(table);
    const auto each = [&](auto f, auto done) {
      Iterator it = start();
      MaskCursor<const uint8_t, V::kWidth, V::kMapping> mask(p.mask, tile_plan, it);
      int i = 0;
      it.batches(tile_plan, [&](const int64_t (&at)[kBatch], int valid) {
        const unsigned mask_bits = masked ? mask.read(valid) : 0;
#pragma unroll
        for (int u = 0; u < kBatch; ++u) {
          if (u >= valid) break;
          Vector residual_vec;
          if (residual != nullptr) residual_vec.load(residual + at[u]);
          const Vector x_vec = x_smem[i + u];
          A g[V::kWidth];
          forget_loads();
          epilogue_backward(p.epilogue, masked, mask_bits >> u * kByteBits, affines, dy_smem[i + u],
                            x_vec, residual_vec, g);
          forget_loads();
          f(u, g, x_vec, at[u]);
        }
        i += kBatch;
        done(valid);
      });
    };

    Pair sum[kChannels];
#pragma unroll
    for (int k = 0; k < kChannels; ++k) sum[k] = {0, 0};
    A g_of_4[kChannels] = {}, dot_of_4[kChannels] = {};
    const auto flush = [&](int k) {
      sum[k].a += g_of_4[k];
      sum[k].b += dot_of_4[k];
      g_of_4[k] = dot_of_4[k] = 0;
    };
    each(
        [&](int u, const A(&g)[V::kWidth], const Vector& x_vec, int64_t) {
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
    for (int k = 0; k < kChannels; ++k) {
      finite = finite && is_finite(sum[k].a) && is_finite(sum[k].b);
    }
    if (!finite) {
#pragma unroll
      for (int k = 0; k < kChannels; ++k) sum[k] = {0, 0};
      each(
          [&](int, const A(&g)[V::kWidth], const Vector& x_vec, int64_t) {
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
    Pair total = chunk_sum(sum, start(), tile_plan, p.shape);
    total = team_total<Iterator>(total, p.plan, shared, p.staging, team, round);
    A mean_of_dy = 0, proj_scale_of_c = 0;
    const int64_t c = channel();
    if (t < channels && c < p.shape.C) {
      // The means are those of the sums that the caller sees.
      const double n = static_cast<double>(p.shape.N * p.shape.S);
      const A rstd = MeanRstd<A>(p.statistics, c).rstd;
      const A dy_sum = static_cast<A>(total.a), dy_xhat_sum = static_cast<A>(total.b * rstd);
      mean_of_dy = static_cast<A>(dy_sum / n);
      proj_scale_of_c = rstd * static_cast<A>(dy_xhat_sum / n);
      if (team.rank == 0) {
        if (p.sum_dy.data != nullptr) set(p.sum_dy, c, dy_sum);
        if (p.sum_dy_xhat.data != nullptr) set(p.sum_dy_xhat, c, dy_xhat_sum);
      }
    }
    if (t < channels) {
      table.set(kMeanDy, t, mean_of_dy);
      table.set(kProjScale, t, proj_scale_of_c);
    }
    __syncthreads();

    // The others are read from shared memory at each use: a block has little else to read there.
    const int split = start().split_of_vector();
    const PerChannel<A, Iterator> mean_dy(split, [&](int k) { return table.get(kMeanDy, k); });
    const PerChannel<A, Iterator> proj_scale(split,
                                             [&](int k) { return table.get(kProjScale, k); });
    each(
        [&](int, const A(&g)[V::kWidth], const Vector& x_vec, int64_t at) {
          Vector rounded;
          if (dresidual != nullptr) {
#pragma unroll
            for (int v = 0; v < V::kWidth; ++v) rounded.set(v, g[v]);
            rounded.store(dresidual + at);
          }
#pragma unroll
          for (int v = 0; v < V::kWidth; ++v) {
            const int k = v % kChannels;
            A d = g[v];
            if (!p.constant_statistics) {
              d = (d - mean_dy[k]) - (x_vec[v] - affines[k].mean) * proj_scale[k];
            }
            rounded.set(v, d * affines[k].scale);
          }
          rounded.store(dx + at);
        },
        [](int) {});
    __syncthreads();  // the table is written again
  }
  if (p.plan.path == Path::Cluster) cluster_sync();  // its other blocks may still read this one's
}

}  // namespace

cudaError_t launch_resident_backward(const ResidentBackwardParams& p, cudaStream_t stream) {
  return with_variant<kWidestOnChip>(p.dtype, p.plan.tile_plan, [&](auto variant) {
    return launch_teams(resident_backward_kernel<decltype(variant)>, p, stream);
  });
}

int64_t resident_backward_blocks(DType dtype, const TilePlan& tile_plan, Path path, int team,
                                 int shared_bytes) {
  int64_t count = 0;
  with_variant<kWidestOnChip>(dtype, tile_plan, [&](auto variant) {
    count = co_resident(resident_backward_kernel<decltype(variant)>, path, team, shared_bytes);
    return cudaSuccess;
  });
  return count;
}

}  // namespace cuda
}  // namespace bnorm_ext
