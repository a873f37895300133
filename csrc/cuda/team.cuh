// What the resident kernels share: a thread's vectors in shared memory, and sums over the blocks of
// a team.
#pragma once

#include <type_traits>

#include "affine.cuh"
#include "params.h"
#include "reduce.cuh"
#include "vec.cuh"

namespace bnorm_ext {
namespace cuda {

// A thread's own vectors of one tensor in shared memory. No other thread reads or writes them, so
// they need no barrier. Neighbouring threads have neighbouring vectors.
template <typename T, int kWidth, Mapping kMapping>
class SmemVectors {
 public:
  static constexpr int kBytes = kWidth * static_cast<int>(sizeof(T));

  // number: which of the tensors that stay on chip
  __device__ __forceinline__ SmemVectors(const SharedLayout& shared, const ResidentPlan& plan,
                                         int number)
      : apart_(kMapping == Mapping::ChannelGroups ? computed_here(plan.apart) : kThreads),
        own_(dynamic_shared<RawVector>(shared.vectors) + number * plan.vectors * apart() +
             static_cast<int>(threadIdx.x)) {}
  // Vectors of 16 bytes are copied asynchronously, and arrive with async_wait.
  static constexpr bool kAsync = kBytes == kVectorBytes;

  // Copies all vectors of the iterator.
  template <typename Iterator>
  __device__ __forceinline__ void fetch(Iterator it, const TilePlan& plan, const T* from) const {
    if constexpr (kAsync) {
      for (int i = 0; it.remaining > 0; ++i, it.advance(plan)) {
        async_copy16(own_ + i * apart(), from + it.offset);
      }
    } else {
      // Loads in flight before the first store: narrow loads need many of them.
      constexpr int kInFlight = 16;
      for (int i = 0; it.remaining > 0; i += kInFlight) {
        RawVector value[kInFlight];
        const int64_t left = it.remaining;
#pragma unroll
        for (int u = 0; u < kInFlight; ++u) {
          if (u >= left) break;
          value[u] = load_bytes<kBytes>(from + it.offset);
          it.advance(plan);
        }
#pragma unroll
        for (int u = 0; u < kInFlight; ++u) {
          if (u < left) own_[(i + u) * apart()] = value[u];
        }
      }
    }
  }
  // Replaces vector i, which has been used, by the iterator's next one, if it has one. Only if kAsync.
  template <typename Iterator>
  __device__ __forceinline__ void refill(int i, const Iterator& next, const T* from) const {
    if constexpr (kAsync) {
      if (next.remaining > 0) async_copy16(own_ + i * apart(), from + next.offset);
    }
  }
  __device__ __forceinline__ Values<T, kWidth> operator[](int i) const {
    Values<T, kWidth> values;
    const RawVector raw = own_[i * apart()];
    values.take(raw);
    return values;
  }

 private:
  using RawVector = std::conditional_t<kAsync, uint4, Bytes<kBytes>>;
  // From one of a thread's vectors to its next one. In ChannelGroups in a register: taken from the
  // parameters at each use it makes kernels spill.
  __device__ __forceinline__ int apart() const {
    return kMapping == Mapping::ChannelGroups ? apart_ : kThreads;
  }
  int apart_;
  Shared<RawVector> own_;
};

// The blocks that work on one tile.
struct Team {
  int64_t number;  // of this block's team
  int rank;        // of this block in it
  int size;

  explicit __device__ __forceinline__ Team(const ResidentPlan& plan)
      : number(blockIdx.x / plan.tile_plan.chunks),
        rank(static_cast<int>(blockIdx.x - number * plan.tile_plan.chunks)),
        size(static_cast<int>(plan.tile_plan.chunks)) {}
  __device__ __forceinline__ Team(int64_t number, int64_t rank, int64_t size)
      : number(number), rank(static_cast<int>(rank)), size(static_cast<int>(size)) {}
};

// How long a block that waits for its team sleeps between two looks, in ns: a fraction of the time
// that a barrier takes, so that the multiprocessor's other block has the issue slots meanwhile. On an
// H200 kernels take as long without it (bench/results/cuda-kernels.json).
constexpr unsigned kSleep = 64;

// A barrier of all threads of a team's blocks, which must all be resident at once; orders their
// accesses to global memory. The lower 31 bits of the team's word count the blocks that have arrived:
// they are 0 between barriers, and between launches. The first block of the team adds what the others
// leave to 2^31, so that the highest bit changes with the last arrival, for which each block waits.
__device__ __forceinline__ void team_barrier(const Staging& staging, const Team& team) {
  __syncthreads();
  if (threadIdx.x == 0) {
    constexpr unsigned kHighest = 0x80000000u;
    unsigned* const word = staging.phases + team.number;
    const unsigned others = static_cast<unsigned>(team.size - 1);
    __threadfence();  // what the block has written is out before it arrives
    const unsigned before = atomicAdd(word, team.rank == 0 ? kHighest - others : 1u);
    while (((load_acquire(word) ^ before) & kHighest) == 0) __nanosleep(kSleep);
  }
  __syncthreads();
}

// Adds `own`, which thread i < channels_of_tile of each block has for channel i of the tile, over
// the blocks of the team in a fixed order: thread i < channels_of_tile of every block gets the same
// total. `round` counts the calls of this launch. Every thread must call. The team must pass a barrier
// before a block of a cluster ends.
template <typename Iterator>
__device__ __forceinline__ Pair team_total(Pair own, const ResidentPlan& plan,
                                           const SharedLayout& shared, const Staging& staging,
                                           const Team& team, int64_t round) {
  if (team.size == 1) return own;
  const int channels = Iterator::channels_of_tile(plan.tile_plan),
            t = static_cast<int>(threadIdx.x);
  // Two buffers in turn: a block may write the next round's sums while others read this round's.
  if (plan.path == Path::Cluster) {
    const int buffer = static_cast<int>(round % 2) * channels * kPairBytes;
    const Shared<Pair> mine = dynamic_shared<Pair>(shared.team + buffer);
    if (t < channels) mine[t] = own;
    cluster_sync();
    return sum_of_parts(team.size, channels, [&](int rank, int i) -> Pair {
      return in_block(mine, static_cast<unsigned>(rank))[i];
    });
  }
  const int64_t at = (round % 2 * plan.teams + team.number) * (team.size + 1) * channels;
  const Workspace<Pair> of_team = Workspace<Pair>(staging.partials) + at;
  if (t < channels) of_team[team.rank * channels + t] = own;
  team_barrier(staging, team);
  // Each block adds up its share of the channels, all of them or a power of two, for all the others.
  int share = channels, first = 0;
  if (team.size > kAddedByAll) {
    share = 1;
    while (share * team.size < channels) share *= 2;
    first = team.rank * share;
  }
  Pair total = {0, 0};
  if (first < channels) {
    total = sum_of_parts(team.size, share, [&](int64_t rank, int i) -> Pair {
      return of_team[rank * channels + first + i];
    });
  }
  if (team.size <= kAddedByAll) return total;
  const Workspace<Pair> totals = of_team + team.size * channels;
  if (first < channels && t < share) totals[first + t] = total;
  team_barrier(staging, team);
  if (t < channels) total = totals[t];
  return total;
}

}  // namespace cuda
}  // namespace bnorm_ext
