// Training forward in one launch that reads x once: a team of blocks keeps its tile in shared
// memory from the statistics to the normalisation.
#include "channel.cuh"
#include "forward.cuh"
#include "kernels.h"
#include "launch.cuh"
#include "mask.cuh"
#include "moments.cuh"
#include "sweep_forward.cuh"
#include "team.cuh"
#include "tile_iterator.cuh"

namespace bnorm_ext {
namespace cuda {
namespace {

// Adds a thread's vectors up, as deviations from about(k) and their squares.
template <typename V, typename About>
__device__ __forceinline__ void sum_on_chip(
    const SmemVectors<typename V::T, V::kWidth, V::kMapping>& x, int vectors, About about,
    Pair (&sum)[TileIterator<V::kWidth, V::kMapping>::kChannels]) {
  using Vector = Values<typename V::T, V::kWidth>;
  for (Pair& s : sum) s = {0, 0};
#pragma unroll 1
  for (int begin = 0; begin < vectors; begin += kRun * kBatch) {
    const int left = vectors - begin, of_run = left < kRun * kBatch ? left : kRun * kBatch;
    MomentSums<V> run;
    const auto batch_at = [&](int i, auto valid, auto f) {
      Vector batch[kBatch];
#pragma unroll
      for (int u = 0; u < kBatch; ++u) {
        if (u < valid) batch[u] = x[begin + i + u];
      }
      f(batch, valid);
    };
    const auto begins = [&](const Vector(&batch)[kBatch], auto valid) { run.begin(batch, valid); };
    const auto adds = [&](const Vector(&batch)[kBatch], auto valid) { run.add(batch, valid); };
    if (of_run < kBatch) {
      batch_at(0, Full<1>{}, begins);
    } else {
      batch_at(0, FullBatch{}, begins);
    }
    int i = 0;
#pragma unroll 1
    for (; i + kBatch <= of_run; i += kBatch) batch_at(i, FullBatch{}, adds);
    // What does not fill a batch is added vector by vector, which takes the least code: a kernel that
    // other kernels have driven out of the instruction cache waits for each line of it. With an
    // epilogue registers spill by that.
    if constexpr (V::kPlain) {
#pragma unroll 1
      for (; i < of_run; ++i) batch_at(i, Full<1>{}, adds);
    } else {
      if (i < of_run) batch_at(i, of_run - i, adds);
    }
    run.end(sum, about);
  }
  if (all_finite(sum)) return;
  for (Pair& s : sum) s = {0, 0};
#pragma unroll 1
  for (int i = 0; i < vectors; ++i) add_in_double<V>(x[i], about, sum);
}

// Formula    mean = sum(x) / n, var = sum((x - mean)^2) / n, rstd = 1 / sqrt(var + eps), with
//            n = N * S; y = act(z), z = fma(x - mean, weight * rstd, bias) + residual; running
//            statistics moved towards mean and var * n / (n - 1)
//            (Ioffe and Szegedy 2015, arXiv:1502.03167)
// Shapes     x, y, residual [N, C, S] in one layout; statistics and parameters [C]; mask: mask.h
// Mapping    plan.h: team b / chunks has tile b / chunks and every `teams`-th after it; each thread
//            keeps its own vectors in shared memory, and fetches those of the next tile into the
//            places of those that it has written
// Bytes      reads x and residual once, writes y and the mask
// Numerics   moments.cuh; added in double over threads and blocks, relative to the channel's first
//            value. Each y is computed in the accumulation type and rounded once.
// Requires   16- or 32-bit values; all blocks of a team resident at once; semaphores, where there
//            are any, that are 0
template <typename V>
__global__ void __launch_bounds__(kThreads, kShares)
    resident_forward_kernel(ResidentForwardParams p) {
  using T = typename V::T;
  using A = Acc<T>;
  using Iterator = TileIterator<V::kWidth, V::kMapping>;
  constexpr int kChannels = Iterator::kChannels;
  static_assert(V::kMapping != Mapping::ChannelsLast, "a thread has two channels at most");
  static_assert(TileTable<V>::kBytes <= kTableBytes, "the plan reserves kTableBytes");
  const TilePlan& tile_plan = p.plan.tile_plan;
  const T* x = static_cast<const T*>(p.x);
  const EpilogueParams epilogue = epilogue_of<V>(p.epilogue);
  const T* residual = static_cast<const T*>(epilogue.residual);
  T* y = static_cast<T*>(p.y);
  const int channels = Iterator::channels_of_tile(tile_plan), t = static_cast<int>(threadIdx.x);
  const SharedLayout shared = shared_layout(V::kMapping, channels);
  const SmemVectors<T, V::kWidth, V::kMapping> x_smem(shared, p.plan, 0);
  const Team team(p.plan);
  const TileTable<V> table(shared.table, Iterator(p.shape, tile_plan, 0, team.rank));
  // Rebuilt on demand, which leaves registers for the sums. Beyond the last tile it has no vector.
  const auto start_of = [&](int64_t tile) { return Iterator(p.shape, tile_plan, tile, team.rank); };
  constexpr bool kRefills = SmemVectors<T, V::kWidth, V::kMapping>::kAsync;
  if (kRefills) x_smem.fetch(start_of(team.number), tile_plan, x);
  int64_t round = 0;
  for (int64_t tile = team.number; tile < tile_plan.tiles; tile += p.plan.teams, ++round) {
    const auto start = [&] { return start_of(tile); };
    if (!kRefills) x_smem.fetch(start(), tile_plan, x);
    async_commit();
    const int vectors = start().remaining;
    // Of thread t < channels; computed on demand too.
    const auto channel = [&] { return tile * channels + t; };
    const auto has_channel = [&] { return t < channels && channel() < p.shape.C; };
    const auto anchor = [&](int64_t c) {
      return c < p.shape.C ? static_cast<A>(anchor_of<T>(p.x, p.shape, c)) : 0;
    };
    // Before the wait, so that they arrive meanwhile.
    A weight = 1, bias = 0, anchor_of_channel = 0;
    if (has_channel()) {
      weight = get_or(p.weight, channel(), A{1});
      bias = get_or(p.bias, channel(), A{0});
      anchor_of_channel = anchor(channel());
    }
    const A first_anchor = anchor(start().channel);
    const A second_anchor = Iterator::kGrouped ? anchor(start().channel + 1) : 0;
    async_wait<0>();

    Pair sum[kChannels];
    sum_on_chip<V>(
        x_smem, vectors,
        [&](int k) -> double {
          return k < start().split_of_vector() ? first_anchor : second_anchor;
        },
        sum);
    Pair total = chunk_sum(sum, start(), tile_plan, p.shape);
    total = team_total<Iterator>(total, p.plan, shared, p.staging, team, round);

    BatchStatistics<A> found;  // read but not used where the tile extends beyond the last channel
    if (has_channel()) found = {p, total, anchor_of_channel, weight, bias};
    if (t < channels) set(table, t, found.affine);
    __syncthreads();
    // After the barrier, so that the other threads write y meanwhile.
    if (team.rank == 0) {
      if (has_channel()) found.write(p, channel());
      count_batch(p, tile);
    }
    const AffineInRegisters<V> affines(table);
    // Lanes share the bytes of a mask: then all lanes of a warp iterate equally often.
    const bool writes_mask = !V::kPlain && p.mask.bytes != nullptr;
    Iterator it = start(), next = start_of(tile + p.plan.teams);
    MaskCursor<uint8_t, V::kWidth, V::kMapping> mask(p.mask, tile_plan, it);
    int i = 0;
    it.template batches<V::kPlain>(
        tile_plan,
        [&](const int64_t (&at)[kBatch], auto valid) {
          Values<T, V::kWidth> batch[kBatch], residual_batch[kBatch];  // batch: x, then y
#pragma unroll
          for (int u = 0; u < kBatch; ++u) {
            if (u >= valid) continue;
            batch[u] = x_smem[i + u];
            if (residual != nullptr) residual_batch[u].load(residual + at[u]);
          }
          const unsigned mask_bits =
              epilogue_forward(epilogue, writes_mask, affines, batch, residual_batch, valid);
#pragma unroll
          for (int u = 0; u < kBatch; ++u) {
            if (u >= valid) continue;
            batch[u].store(y + at[u]);
            x_smem.refill(i + u, next, x);
            next.advance(tile_plan);
          }
          if (writes_mask) mask.write(mask_bits, valid);
          i += valid;
        },
        writes_mask);
  }
  // Blocks of the cluster may still read this one's shared memory.
  if (p.plan.path == Path::Cluster) cluster_sync();
}

template <typename V>
TeamKernel<ResidentForwardParams>& team_kernel() {
  if constexpr (V::kMapping == Mapping::ChannelsLast) {
    static TeamKernel<ResidentForwardParams> kernel(sweep_forward_kernel<V>);
    return kernel;
  } else {
    static TeamKernel<ResidentForwardParams> kernel(resident_forward_kernel<V>);
    return kernel;
  }
}

}  // namespace

cudaError_t launch_resident_forward(const ResidentForwardParams& p, cudaStream_t stream) {
  return with_variant<kWidestOnChip, true>(
      p.dtype, p.plan.tile_plan, is_plain(p),
      [&](auto variant) { return team_kernel<decltype(variant)>().launch(p, stream); });
}

int64_t resident_forward_blocks(DType dtype, const TilePlan& tile_plan, bool plain, Path path,
                                int team, int shared_bytes) {
  int64_t count = 0;
  with_variant<kWidestOnChip, true>(dtype, tile_plan, plain, [&](auto variant) {
    count = team_kernel<decltype(variant)>().co_resident(path, team, shared_bytes);
    return cudaSuccess;
  });
  return count;
}

}  // namespace cuda
}  // namespace bnorm_ext
