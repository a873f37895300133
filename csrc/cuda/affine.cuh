// The constants of z per channel, and where a kernel keeps them: in registers, or in a table in
// shared memory where the sums need the registers.
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
    const MeanRstd<A> known(statistics, c);
    mean = known.mean;
    scale = get_or(weight, c, A{1}) * known.rstd;
    shift = static_cast<A>(shift_of(get_or(bias, c, A{0}), get(statistics.mean, c) - mean, scale));
  }
};

// A value for each channel of a thread, in registers. In ChannelGroups a thread has two channels,
// and each use selects one of the two values.
template <typename A, typename Iterator>
class PerChannel {
 public:
  static constexpr int kChannels = Iterator::kChannels;

  // f(k): the value of channel it.channel_of(k), for it.split_of_vector() = split.
  template <typename F>
  __device__ __forceinline__ PerChannel(int split, F f) : split_(split) {
    if (Iterator::kGrouped) {
      of_[0] = f(0);
      of_[1] = f(kChannels - 1);
    } else {
#pragma unroll
      for (int k = 0; k < kChannels; ++k) of_[k] = f(k);
    }
  }
  __device__ __forceinline__ A operator[](int k) const {
    return !Iterator::kGrouped ? of_[k] : k < split_ ? of_[0] : of_[1];
  }

 private:
  A of_[Iterator::kGrouped ? 2 : kChannels];
  int split_;
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

// The constants of z of a thread's channels, in registers: computed from the parameters, or read
// once from a table.
template <typename V>
class AffineInRegisters
    : public PerChannel<Affine<Acc<typename V::T>>, TileIterator<V::kWidth, V::kMapping>> {
 public:
  using A = Acc<typename V::T>;
  using Iterator = TileIterator<V::kWidth, V::kMapping>;
  static constexpr int kBytes = 0;  // of shared memory

  template <typename Params>
  __device__ __forceinline__ AffineInRegisters(const Params& p, const Iterator& it, int = 0)
      : PerChannel<Affine<A>, Iterator>(it.split_of_vector(), [&](int k) {
          return it.channel < p.shape.C
                     ? Affine<A>(p.statistics, p.weight, p.bias, it.channel_of(k))
                     : Affine<A>();
        }) {}
  template <int kRows>
  __device__ __forceinline__ AffineInRegisters(const Table<V, kRows>& table, const Iterator& it)
      : PerChannel<Affine<A>, Iterator>(
            it.split_of_vector(), [&](int k) { return AffineInTable<Table<V, kRows>>(table)[k]; }) {
  }
};

// The constants of z of a tile's channels, computed from the parameters into a table of their own.
template <typename V>
class AffineInShared : public AffineInTable<Table<V, kAffineRows>> {
 public:
  using Rows = Table<V, kAffineRows>;
  using A = typename Rows::A;
  static constexpr int kBytes = Rows::kBytes;

  // Every thread must call: there is a barrier.
  template <typename Params>
  __device__ __forceinline__ AffineInShared(const Params& p, const typename Rows::Iterator& it,
                                            int byte_offset)
      : AffineInTable<Rows>(Rows(byte_offset, it)) {
    const int channels = Rows::Iterator::channels_of_tile(p.plan),
              i = static_cast<int>(threadIdx.x);
    const int64_t c = it.tile * channels + i;
    if (i < channels && c < p.shape.C) {
      set(this->table, i, Affine<A>(p.statistics, p.weight, p.bias, c));
    }
    __syncthreads();
  }
};

}  // namespace cuda
}  // namespace bnorm_ext
