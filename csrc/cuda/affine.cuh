// The constants of z per channel, and where a kernel keeps them: in a table in shared memory, which
// one thread per channel fills, and from which each thread copies into registers what it needs at
// every vector.
#pragma once

#include <type_traits>

#include "channel.cuh"
#include "params.h"
#include "tile_iterator.cuh"

namespace bnorm_ext {
namespace cuda {

// The constants of z of one channel.
template <typename A>
struct Affine {
  A mean, scale, shift;

  Affine() = default;
  __device__ __forceinline__ Affine(const Statistics& statistics, const ChannelVector& weight,
                                    const ChannelVector& bias, int64_t c) {
    prefetch_channel(c, statistics.mean, statistics.rest, statistics.var, weight, bias);
    const MeanRstd<A> known(statistics, c);
    mean = known.mean;
    scale = get_or(weight, c, A{1}) * known.rstd;
    shift = shift_of(get_or(bias, c, A{0}), known.rest, scale);
  }
};

// A value for each of the kChannels places of a vector, in registers.
template <typename A, typename Iterator>
class PerChannel {
 public:
  static constexpr int kChannels = Iterator::kChannels;

  // f(k): the value of channel it.channel_of(k)
  template <typename F>
  explicit __device__ __forceinline__ PerChannel(F f) {
#pragma unroll
    for (int k = 0; k < kChannels; ++k) of_[k] = f(k);
  }
  __device__ __forceinline__ const A& operator[](int k) const { return of_[k]; }

 private:
  A of_[kChannels];
};

// kRows constants of each of a tile's channels, in shared memory. Neighbouring threads read
// neighbouring words, and the distances between a thread's words are known at compile time.
template <typename V, int kRows>
class Table {
 public:
  using A = Acc<typename V::T>;
  using Iterator = TileIterator<V::kWidth, V::kMapping>;
  static constexpr int kChannels = Iterator::kChannels;
  static constexpr int kColumns = V::kWidth == 1 ? kNarrowColumns : kWideColumns;
  static constexpr int kRow = Iterator::kGrouped ? kMostGrouped : kChannels * kColumns;
  static_assert(kRow <= kThreads, "a thread for each channel of the tile");
  static constexpr int kSplitsAt = kRows * kRow * static_cast<int>(sizeof(A));
  static constexpr int kBytes =
      kSplitsAt + (Iterator::kGrouped ? kThreads * static_cast<int>(sizeof(int)) : 0);

  // byte_offset: a multiple of 16
  __device__ __forceinline__ Table(int byte_offset, const Iterator& it)
      : table_(dynamic_shared<A>(byte_offset)),
        own_(table_ + (Iterator::kGrouped ? it.first : it.column)),
        split_(dynamic_shared<int>(byte_offset + kSplitsAt) + static_cast<int>(threadIdx.x)) {
    if (Iterator::kGrouped) split_[0] = it.split;
  }
  // Sets the constant of channel i of the tile. Other threads may read it after a barrier.
  __device__ __forceinline__ void set(int row, int i, A value) const {
    const int at = Iterator::kGrouped ? i : i % kChannels * kColumns + i / kChannels;
    table_[row * kRow + at] = value;
  }
  // The constant of channel it.channel_of(k) of this thread.
  __device__ __forceinline__ A get(int row, int k) const {
    if (!Iterator::kGrouped) return own_[row * kRow + k * kColumns];
    const int split = split_[0];
    return own_[row * kRow + (k >= split)];
  }

 private:
  Shared<A> table_, own_;
  // The thread's own split. In shared memory, because from a register the compiler precomputes the
  // address of every value of a vector, which takes more registers.
  Shared<int> split_;
};

// The rows of a table; the first kAffineRows hold the constants of z.
enum TableRow { kMean, kScale, kShift, kMeanDy, kProjScale };
constexpr int kAffineRows = kShift + 1;
static_assert(kProjScale == kTableRows - 1, "");
template <typename V>
using TileTable = Table<V, kTableRows>;

template <typename Table, typename A>
__device__ __forceinline__ void set(const Table& table, int i, const Affine<A>& affine) {
  table.set(kMean, i, affine.mean);
  table.set(kScale, i, affine.scale);
  table.set(kShift, i, affine.shift);
}

// The constants of z, read from a table at each use.
template <typename Table>
struct AffineInTable {
  static constexpr int kChannels = Table::kChannels;
  Table table;

  explicit __device__ __forceinline__ AffineInTable(const Table& table) : table(table) {}
  __device__ __forceinline__ Affine<typename Table::A> operator[](int k) const {
    Affine<typename Table::A> affine;
    affine.mean = table.get(kMean, k);
    affine.scale = table.get(kScale, k);
    affine.shift = table.get(kShift, k);
    return affine;
  }
};

// The constants of z of a thread's channels, in registers: read once from a table.
template <typename V>
class AffineInRegisters
    : public PerChannel<Affine<Acc<typename V::T>>, TileIterator<V::kWidth, V::kMapping>> {
 public:
  template <typename Table>
  explicit __device__ __forceinline__ AffineInRegisters(const Table& table)
      : PerChannel<Affine<Acc<typename V::T>>, TileIterator<V::kWidth, V::kMapping>>(
            [&](int k) { return AffineInTable<Table>(table)[k]; }) {}
};

// The same, but only the mean in registers: scale and shift are read from the table at each use.
// For the sums of backward, where few activations need them.
template <typename V, typename Table>
class MeanInRegisters {
 public:
  using A = Acc<typename V::T>;
  using Iterator = TileIterator<V::kWidth, V::kMapping>;
  static constexpr int kChannels = Iterator::kChannels;

  explicit __device__ __forceinline__ MeanInRegisters(const Table& table)
      : table_(table), mean_([&](int k) { return table.get(kMean, k); }) {}
  __device__ __forceinline__ Affine<A> operator[](int k) const {
    Affine<A> affine;
    affine.mean = mean_[k];
    affine.scale = table_.get(kScale, k);
    affine.shift = table_.get(kShift, k);
    return affine;
  }
  __device__ __forceinline__ A mean(int k) const { return mean_[k]; }

 private:
  Table table_;
  PerChannel<A, Iterator> mean_;
};

// Fills the first rows of a table with the constants of z of the tile's channels, by the parameters.
// Every thread must call: there is a barrier, after which every thread may read them.
template <typename Table, typename Params, typename Iterator>
__device__ __forceinline__ void fill(const Table& table, const Params& p, const TilePlan& plan,
                                     const Iterator& it) {
  const int channels = Iterator::channels_of_tile(plan), i = static_cast<int>(threadIdx.x);
  const int64_t c = it.tile * channels + i;
  if (i < channels) {
    Affine<typename Table::A> affine = {};  // read but not used beyond the last channel
    if (c < p.shape.C) affine = {p.statistics, p.weight, p.bias, c};
    set(table, i, affine);
  }
  __syncthreads();
}

}  // namespace cuda
}  // namespace bnorm_ext
