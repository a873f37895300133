// What the kernels share that keep their part of a tensor on chip: a thread's vectors in shared
// memory, the constants of a tile, and sums over the blocks of a team.
#pragma once

#include "epilogue.cuh"
#include "params.h"
#include "reduce.cuh"
#include "vec.cuh"

namespace bnorm_ext {
namespace cuda {

// A thread's own vectors of one tensor in shared memory; nobody else reads or writes them.
// Neighbouring threads have neighbouring ones.
template <typename T, int kWidth>
class Slots {
 public:
  // number: of the tensor, of those that stay on chip
  __device__ __forceinline__ Slots(const SharedLayout& shared, const ResidentPlan& plan, int number)
      : own_(dynamic_shared<uint4>(shared.vectors) + number * plan.vectors * kThreads +
             static_cast<int>(threadIdx.x)) {}
  // All of the walk's vectors, under way until async_wait.
  template <typename Walk>
  __device__ __forceinline__ void fetch(Walk walk, const WalkPlan& plan, const T* from) const {
    for (int i = 0; walk.remaining > 0; ++i, walk.advance(plan)) {
      async_copy16(own_ + i * kThreads, from + walk.offset);
    }
  }
  __device__ __forceinline__ Values<T, kWidth> operator[](int i) const {
    Values<T, kWidth> values;
    values.take(own_[i * kThreads]);
    return values;
  }

 private:
  Shared<uint4> own_;
};

// What a table has.
enum TableRow { kMean, kScale, kShift, kMeanDy, kSlope };
static_assert(kSlope == kTableRows - 1, "");

// Constants of a tile's channels in shared memory, [kTableRows, kChannels, kWideColumns]:
// neighbouring threads have neighbouring words, at distances that are constants.
template <typename V>
class Table {
 public:
  using A = Acc<typename V::T>;
  static constexpr int kChannels = V::kLast ? V::kWidth : 1;
  static constexpr int kRow = kChannels * kWideColumns;
  static_assert(kTableRows * kRow * static_cast<int>(sizeof(A)) <= kTableBytes, "");

  __device__ __forceinline__ Table(const SharedLayout& shared, int columns)
      : table_(dynamic_shared<A>(shared.table)),
        own_(table_ + (static_cast<int>(threadIdx.x) & (columns - 1))) {}
  // Of channel i of the tile; a barrier before others read it.
  __device__ __forceinline__ void set(int row, int i, A value) const {
    table_[row * kRow + i % kChannels * kWideColumns + i / kChannels] = value;
  }
  __device__ __forceinline__ void set(int i, const Affine<A>& affine) const {
    set(kMean, i, affine.mean);
    set(kScale, i, affine.scale);
    set(kShift, i, affine.shift);
  }
  // Of channel k of this thread.
  __device__ __forceinline__ A get(int row, int k) const {
    return own_[row * kRow + k * kWideColumns];
  }

 private:
  Shared<A> table_, own_;
};

// The constants of z from the table, at each use, or once.
template <typename V>
struct AffineInTable {
  static constexpr int kChannels = Table<V>::kChannels;
  Table<V> table;
  __device__ __forceinline__ Affine<typename Table<V>::A> operator[](int k) const {
    Affine<typename Table<V>::A> affine;
    affine.mean = table.get(kMean, k);
    affine.scale = table.get(kScale, k);
    affine.shift = table.get(kShift, k);
    return affine;
  }
};
template <typename V>
class AffineFromTable {
 public:
  static constexpr int kChannels = Table<V>::kChannels;
  explicit __device__ __forceinline__ AffineFromTable(const Table<V>& table) {
#pragma unroll
    for (int k = 0; k < kChannels; ++k) of_[k] = AffineInTable<V>{table}[k];
  }
  __device__ __forceinline__ Affine<typename Table<V>::A> operator[](int k) const { return of_[k]; }

 private:
  Affine<typename Table<V>::A> of_[kChannels];
};

// The blocks that share a tile.
struct Team {
  int64_t number;  // of this block's team
  int rank;        // of this block in it
  int size;

  explicit __device__ __forceinline__ Team(const ResidentPlan& plan)
      : number(blockIdx.x / plan.walk.chunks),
        rank(static_cast<int>(blockIdx.x - number * plan.walk.chunks)),
        size(static_cast<int>(plan.walk.chunks)) {}
};

// A barrier of all threads of a team's blocks, which must all be resident; orders their accesses to
// global memory. The ticket wraps around to 0 with the last arrival, which begins the next
// generation.
__device__ __forceinline__ void team_barrier(const Exchange& exchange, const Team& team) {
  __syncthreads();
  if (threadIdx.x == 0) {
    unsigned* generation = exchange.generation + team.number;
    const unsigned highest = static_cast<unsigned>(team.size - 1);
    const unsigned before = atomicAdd(generation, 0u);
    __threadfence();
    if (atomicInc(exchange.ticket + team.number, highest) == highest) {
      __threadfence();
      atomicAdd(generation, 1u);
    } else {
      while (atomicAdd(generation, 0u) == before) {
      }
    }
    __threadfence();
  }
  __syncthreads();
}

// Adds `own`, which thread i < channels of each block has for channel i of the tile, over the
// blocks of the team in a fixed order: the same total, in the same threads, in all of them. `round`
// counts the totals of this launch. Every thread calls; the team has passed a barrier since its
// last call, and passes another one before a block of a cluster ends.
template <int kChannels>
__device__ __forceinline__ Pair team_total(Pair own, const ResidentPlan& plan,
                                           const SharedLayout& shared, const Exchange& exchange,
                                           const Team& team, int64_t round) {
  if (team.size == 1) return own;
  const int columns = plan.walk.columns, channels = columns * kChannels;
  const int t = static_cast<int>(threadIdx.x), row = t / columns, column = t & (columns - 1);
  Pair sum[kChannels];
#pragma unroll
  for (int k = 0; k < kChannels; ++k) sum[k] = {0, 0};
  const auto add = [&](int k, const Pair& part) {
    sum[k].a += part.a;
    sum[k].b += part.b;
  };
  if (plan.path == Path::Cluster) {
    const Shared<Pair> mine = dynamic_shared<Pair>(shared.team);
    if (t < channels) mine[t] = own;
    cluster_sync();
    for (int r = row; r < team.size; r += plan.walk.rows) {
      const Distributed<Pair> of_rank = in_block(mine, static_cast<unsigned>(r));
#pragma unroll
      for (int k = 0; k < kChannels; ++k) add(k, of_rank[column * kChannels + k]);
    }
  } else {
    // Twice as much memory as one round needs: blocks that are ahead write the next one's.
    const int64_t at = (round % 2 * plan.teams + team.number) * team.size * channels;
    const Workspace<Pair> of_team = Workspace<Pair>(exchange.partials) + at;
    if (t < channels) of_team[team.rank * channels + t] = own;
    team_barrier(exchange, team);
    for (int r = row; r < team.size; r += plan.walk.rows) {
#pragma unroll
      for (int k = 0; k < kChannels; ++k) add(k, of_team[r * channels + column * kChannels + k]);
    }
  }
  return block_sum(sum, columns);
}

}  // namespace cuda
}  // namespace bnorm_ext
