// Training forward in one launch that reads x once: a team of blocks keeps its tile in shared
// memory from the statistics to the normalisation.
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

// Sums f(value, k) and, with kSquares, its square over a thread's vectors, k being the thread's
// channel. Four values at a time are summed in the accumulation type; these partial sums are added
// in double. Where a sum is not finite, everything is summed again in double: either the data is
// not finite, or float overflowed although the result fits.
template <bool kSquares, typename V, typename F>
__device__ __forceinline__ void sum_on_chip(
    const SmemVectors<typename V::T, V::kWidth>& x, int vectors, F f,
    Pair (&sum)[TileIterator<V::kWidth, V::kMapping>::kChannels]) {
  using A = Acc<typename V::T>;
  constexpr int kChannels = TileIterator<V::kWidth, V::kMapping>::kChannels;
  constexpr int kPerVector = V::kWidth / kChannels;  // values of one channel in a vector
#pragma unroll
  for (int k = 0; k < kChannels; ++k) sum[k] = {0, 0};
#pragma unroll 1  // two batches at once would spill registers
  for (int i = 0; i < vectors; i += kBatch) {
    Values<typename V::T, V::kWidth> x_vec[kBatch];
    const int valid = vectors - i < kBatch ? vectors - i : kBatch;
#pragma unroll
    for (int u = 0; u < kBatch; ++u) {
      if (u < valid) x_vec[u] = x[i + u];
    }
#pragma unroll
    for (int k = 0; k < kChannels; ++k) {
#pragma unroll
      for (int begin = 0; begin < kBatch * kPerVector; begin += 4) {
        A of_4 = 0, squares_of_4 = 0;
#pragma unroll
        for (int j = begin; j < begin + 4; ++j) {
          const A d = f(x_vec[j / kPerVector][k * kPerVector + j % kPerVector], k);
          of_4 += j / kPerVector < valid ? d : A{0};
          if (kSquares)
            squares_of_4 = j / kPerVector < valid ? fma(d, d, squares_of_4) : squares_of_4;
        }
        sum[k].a += of_4;
        if (kSquares) sum[k].b += squares_of_4;
      }
    }
  }
  bool finite = true;
#pragma unroll
  for (int k = 0; k < kChannels; ++k) finite = finite && is_finite(sum[k].a) && is_finite(sum[k].b);
  if (finite) return;
#pragma unroll
  for (int k = 0; k < kChannels; ++k) sum[k] = {0, 0};
#pragma unroll 1
  for (int i = 0; i < vectors; ++i) {
    const Values<typename V::T, V::kWidth> value = x[i];
#pragma unroll
    for (int v = 0; v < V::kWidth; ++v) {
      const double d = f(static_cast<double>(value[v]), v % kChannels);
      sum[v % kChannels].a += d;
      if (kSquares) sum[v % kChannels].b += d * d;
    }
  }
}

// Formula    mean = sum(x) / n, var = sum((x - mean)^2) / n, rstd = 1 / sqrt(var + eps), with
//            n = N * S; y = act(z), z = fma(x - mean, weight * rstd, bias) + residual; running
//            statistics moved towards mean and var * n / (n - 1)
//            (Ioffe and Szegedy 2015, arXiv:1502.03167)
// Shapes     x, y, residual [N, C, S] in one layout; statistics and parameters [C]; mask: mask.h
// Mapping    plan.h: team b / chunks has tile b / chunks and, in a cooperative grid, every
//            `teams`-th after it; each thread keeps its own vectors in shared memory
// Bytes      reads x and residual once, writes y and the mask
// Numerics   The mean of the block's values in double, rounded; then the deviations from it, whose
//            sum corrects that rounding. Blocks are added in double, relative to the channel's
//            first value. Each y is computed in the accumulation type and rounded once.
// Requires   16- or 32-bit values; all blocks of a team resident at once; semaphores, where there
//            are any, that are 0
template <typename V>
__global__ void __launch_bounds__(kThreads, kShares)
    resident_forward_kernel(ResidentForwardParams p) {
  using T = typename V::T;
  using A = Acc<T>;
  using Iterator = TileIterator<V::kWidth, V::kMapping>;
  constexpr int kChannels = Iterator::kChannels;
  static_assert(TileTable<V>::kBytes <= kTableBytes, "the plan reserves kTableBytes");
  const TilePlan& tile_plan = p.plan.tile_plan;
  const T* x = static_cast<const T*>(p.x);
  const T* residual = static_cast<const T*>(p.epilogue.residual);
  T* y = static_cast<T*>(p.y);
  const int channels = Iterator::channels_of_tile(tile_plan), t = static_cast<int>(threadIdx.x);
  const SharedLayout shared = shared_layout(V::kMapping, channels);
  const SmemVectors<T, V::kWidth> x_smem(shared, p.plan, 0);
  const Team team(p.plan);
  const TileTable<V> table(shared.table, Iterator(p.shape, tile_plan, team.rank));
  int64_t round = 0;
  for (int64_t tile = team.number; tile < tile_plan.tiles; tile += p.plan.teams, ++round) {
    // Rebuilt on demand, which leaves registers for the sums.
    const auto start = [&] {
      return Iterator(p.shape, tile_plan, tile * tile_plan.chunks + team.rank);
    };
    x_smem.fetch(start(), tile_plan, x);
    async_commit();
    const int vectors = static_cast<int>(start().remaining);
    // Of thread t < channels; computed on demand too.
    const auto channel = [&] { return tile * channels + t; };
    const auto has_channel = [&] { return t < channels && channel() < p.shape.C; };
    const auto n_of_block = [&] {
      return static_cast<double>(values_in_chunk<V::kMapping>(p.shape, tile_plan, team.rank, t));
    };
    const A anchor = has_channel() ? load_one(first_of_channel<T>(p.x, p.shape, channel())) : A{0};
    async_wait<0>();

    Pair sum[kChannels];
    sum_on_chip<false, V>(x_smem, vectors, [](auto value, int) { return value; }, sum);
    Pair total = chunk_sum(sum, start(), tile_plan, p.shape);
    const A block_mean = static_cast<A>(total.a / n_of_block());
    if (t < channels) table.set(kMean, t, block_mean);
    __syncthreads();
    const PerChannel<A, Iterator> block_means(start().split_of_vector(),
                                              [&](int k) { return table.get(kMean, k); });
    sum_on_chip<true, V>(
        x_smem, vectors, [&](auto value, int k) { return value - block_means[k]; }, sum);
    total = chunk_sum(sum, start(), tile_plan, p.shape);
    // Relative to the anchor, which is the same in all blocks of the team, so that their sums can
    // be added.
    const double about = is_finite(anchor) ? static_cast<double>(anchor) : 0;
    const double shift = static_cast<double>(block_mean) - about;
    // Deviations from an infinite mean are NaN. Without them the mean stays infinite; the variance
    // is NaN.
    if (!is_finite(block_mean)) total.a = 0;
    const double n_here = n_of_block();
    total = {n_here * shift + total.a, total.b + shift * (2 * total.a + n_here * shift)};
    if (Iterator::kGrouped && n_here == 0) total = {0, 0};  // a piece without this channel
    total = team_total<Iterator>(total, p.plan, shared, p.staging, team, round);

    Affine<A> affine = {};  // read but not used where the tile extends beyond the last channel
    if (has_channel()) {
      const int64_t c = channel();
      const double n = static_cast<double>(p.shape.N * p.shape.S);
      const double mean = about + total.a / n, var = variance_of(total, n);
      const A rstd = rstd_of<A>(var, p.eps);
      affine.mean = static_cast<A>(mean);
      affine.scale = get_or(p.weight, c, A{1}) * rstd;
      const bool is_recomputed = p.epilogue.act != Activation::Identity;  // z, by backward
      affine.shift = static_cast<A>(
          shift_of(get_or(p.bias, c, A{0}), is_recomputed ? 0 : mean - affine.mean, affine.scale));
      if (team.rank == 0) {
        store_one(static_cast<A*>(p.mean) + c, affine.mean);
        store_one(static_cast<A*>(p.rstd) + c, rstd);
        update_running(p.running, c, mean, var, n);
      }
    }
    if (t < channels) set(table, t, affine);
    if (p.running.num_batches_tracked != nullptr && team.rank == 0) {
      const bool is_last =
          p.tiles_done == nullptr ? tile == 0 : last_to_arrive(p.tiles_done, tile_plan.tiles);
      if (is_last && t == 0) ++*p.running.num_batches_tracked;
    }
    __syncthreads();
    const AffineInRegisters<V> affines(table, start());
    // Lanes share the bytes of a mask: then all lanes of a warp iterate equally often.
    const bool writes_mask = p.mask.bytes != nullptr;
    Iterator it = start();
    MaskCursor<uint8_t, V::kWidth, V::kMapping> mask(p.mask, tile_plan, it);
    int i = 0;
    it.batches(
        tile_plan,
        [&](const int64_t (&at)[kBatch], int valid) {
          Values<T, V::kWidth> residual_vec[kBatch];
#pragma unroll
          for (int u = 0; u < kBatch; ++u) {
            if (u < valid && residual != nullptr) residual_vec[u].load(residual + at[u]);
          }
          unsigned mask_bits = 0;
#pragma unroll
          for (int u = 0; u < kBatch; ++u) {
            if (u >= valid) break;
            Values<T, V::kWidth> vec = x_smem[i + u];  // x, then y
            mask_bits |= epilogue_forward(p.epilogue, writes_mask, affines, vec, residual_vec[u])
                         << (u * kByteBits);
            vec.store(y + at[u]);
          }
          if (writes_mask) mask.write(mask_bits, valid);
          i += kBatch;
        },
        writes_mask);
  }
  // Blocks of the cluster may still read this one's shared memory.
  if (p.plan.path == Path::Cluster) cluster_sync();
}

template <typename V>
TeamKernel<ResidentForwardParams>& team_kernel() {
  static TeamKernel<ResidentForwardParams> kernel(resident_forward_kernel<V>);
  return kernel;
}

}  // namespace

cudaError_t launch_resident_forward(const ResidentForwardParams& p, cudaStream_t stream) {
  return with_variant<kWidestOnChip>(p.dtype, p.plan.tile_plan, [&](auto variant) {
    return team_kernel<decltype(variant)>().launch(p, stream);
  });
}

int64_t resident_forward_blocks(DType dtype, const TilePlan& tile_plan, Path path, int team,
                                int shared_bytes) {
  int64_t count = 0;
  with_variant<kWidestOnChip>(dtype, tile_plan, [&](auto variant) {
    count = team_kernel<decltype(variant)>().co_resident(path, team, shared_bytes);
    return cudaSuccess;
  });
  return count;
}

}  // namespace cuda
}  // namespace bnorm_ext
