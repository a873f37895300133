// How the work on a tensor is divided: everything that is decided from its shape and its size.
// division.h gives each thread its share of the chunks, parallel.h runs the threads, iterate.h goes
// through one chunk.
//
// Chunks, and the order of the additions within one, depend on the shape and the instruction set
// alone. This makes results independent of the number of threads.
//
// Free of torch headers. Everything is in an unnamed namespace, because files compiled for
// different instruction sets include this (see vec.h).
#pragma once

#include <cstdint>

#include "params.h"

namespace bnorm_ext {
namespace cpu {
namespace {

constexpr int64_t min(int64_t a, int64_t b) {
  return a < b ? a : b;
}
constexpr int64_t max(int64_t a, int64_t b) {
  return a < b ? b : a;
}
constexpr int64_t clamp(int64_t v, int64_t lo, int64_t hi) {
  return v < lo ? lo : v > hi ? hi : v;
}
constexpr int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

// ---- Rows and columns -------------------------------------------------------------------------

// The kernels know one layout: element (n, c, s) at (n * C + c) * S + s. ChannelsLast is the case
// of N * S samples with one position each.
constexpr Shape as_channels_first(const Shape& shape) {
  if (shape.layout == Layout::ChannelsFirst) return shape;
  return {shape.N * shape.S, shape.C, 1, Layout::ChannelsFirst};
}

// The smallest number of pieces of `length` values that together are a multiple of 16 values, the
// widest vector.
constexpr int64_t whole_vectors(int64_t length) {
  int64_t pieces = 16;
  for (; length % 2 == 0 && pieces > 1; length /= 2) pieces /= 2;
  return pieces;
}

// A row is the S values of one channel in one sample. Sums take short rows by columns: the chunk is
// a matrix with a row per sample and a column per element of a sample (Tile below). Rows are short
// under 16 of the widest vectors; then the masked vector at the end of a row costs too much.
constexpr int64_t kShortRow = 256;
constexpr bool is_short(const Shape& shape) {
  return shape.S < kShortRow;
}

// Elementwise passes take rows by columns only under this length, or under a vector. Longer short
// rows are read in memory order, which is faster than several strided streams (bench/NOTES.md, 14).
constexpr int64_t kTinyRow = 16;

// Elementwise passes join consecutive rows of fewer vectors than this: the end of one row and the
// beginning of the next make one vector. Longer rows gain nothing by it (bench/NOTES.md, 27).
constexpr int64_t kJoinedVectors = 8;

// Samples shorter than this are folded: several consecutive ones make one row of the matrix.
constexpr int64_t kShortSample = 128;
constexpr bool is_folded(const Shape& shape) {
  return is_short(shape) && shape.C * shape.S < kShortSample;
}
// Samples in a row of the matrix, in elementwise passes: as many as make whole vectors, and rows long
// enough that what happens once for each does not show (bench/NOTES.md, 48).
constexpr int64_t kFoldedRow = 512;
constexpr int64_t samples_per_row(const Shape& shape) {
  if (!is_folded(shape)) return 1;
  const int64_t sample = shape.C * shape.S, whole = whole_vectors(sample);
  return whole * ceil_div(kFoldedRow, whole * sample);
}
// The same in sums: as few as make whole vectors, also of 32 values, because each chunk has a cost
// per column. Where that is one sample, threads may divide the channels.
constexpr int64_t samples_per_summed_row(const Shape& shape) {
  if (!is_folded(shape)) return 1;
  const int64_t sample = shape.C * shape.S, whole = whole_vectors(sample);
  return whole * sample % 32 != 0 && whole * sample < kShortSample ? 2 * whole : whole;
}

// Columns of a tile, at most: their sums and coefficients stay in L1.
constexpr int64_t kColumns = 2048;
static_assert(16 * (kShortSample - 1) <= kColumns && 2 * kFoldedRow <= kColumns,
              "a folded row is one tile");
static_assert(kColumns / (kShortRow - 1) >= 8, "a tile has at least eight channels");

// Channels per tile: as many as fit, with a multiple of 16 elements, so that all tiles are aligned
// if the first one is. Where that does not fit, a multiple of 8, for whole bytes of a mask.
constexpr int64_t channels_per_tile(const Shape& shape) {
  if (is_folded(shape)) return shape.C;
  const int64_t whole = whole_vectors(shape.S), fit = kColumns / shape.S;
  return fit < whole ? fit / 8 * 8 : fit / whole * whole;
}

// Where an element is in a tensor, and where its bit is in a mask.
struct Offset {
  int64_t element, bit;
  constexpr Offset operator+(int64_t elements) const {
    return {element + elements, bit + elements};
  }
};

// Channels [c0, c1) of a chunk as a matrix. Column j belongs to channel c0 + j / S % (c1 - c0).
struct Tile {
  int64_t c0, c1;
  Offset first;     // of row 0
  int64_t stride;   // elements from row to row
  int64_t padding;  // bits from row to row of a mask, beyond stride
  int64_t rows, width;
  int64_t rest;  // columns of one more, incomplete row; or 0

  Offset row(int64_t r) const {
    return {first.element + r * stride, first.bit + r * (stride + padding)};
  }
  int64_t samples_per_row(int64_t S) const { return width / ((c1 - c0) * S); }
};

// ---- Masks ------------------------------------------------------------------------------------

constexpr int64_t kMaskSlack = 8;  // bytes behind the last row: kernels read eight at a time

// Where the bits of a mask are: one per element, in memory order. Each mask row starts at a whole
// byte, because different threads may write neighbouring rows. A mask row is one row of a channel
// where rows are long, one sample where they are short. Where samples are folded all bits are one
// row; there threads divide the samples into multiples of eight, which are whole bytes.
class MaskRows {
 public:
  explicit constexpr MaskRows(const Shape& shape)
      : N_(shape.N),
        C_(shape.C),
        S_(shape.S),
        per_sample_(is_short(shape)),
        padding_(is_folded(shape) ? 0 : (8 - (per_sample_ ? C_ * S_ : S_) % 8) % 8) {}
  // The bit of an element, which is in sample n and channel c.
  constexpr int64_t bit(int64_t element, int64_t n, int64_t c) const {
    return element + padding_ * (per_sample_ ? n : n * C_ + c);
  }
  // Unused bits at the end of each mask row.
  constexpr int64_t padding() const { return padding_; }
  constexpr int64_t bytes() const {
    return ceil_div(bit(N_ * C_ * S_, per_sample_ ? N_ : N_ - 1, C_), 8) + kMaskSlack;
  }

 private:
  int64_t N_, C_, S_;
  bool per_sample_;
  int64_t padding_;
};

// Threads that share a tensor by samples take multiples of this many, for whole bytes of a mask and
// for shares that start at whole vectors.
constexpr int64_t sample_unit(const Shape& shape) {
  return is_folded(shape) ? 32 : 1;
}

// ---- Chunks -----------------------------------------------------------------------------------

// Work on fewer elements than about this is faster on one thread.
constexpr int64_t kGrain = 32768;

// `moments` and `sums` take at most this many channels per call: their arrays are on the stack.
constexpr int64_t kMaxChannelsPerCall = 2048;

// Threads divide a chunk by channels, in units. The unit is the fewest channels that start at whole
// vectors if the first one does. Where that leaves threads with unequal shares it is halved, down
// to 8 values of a sample, half of a cache line.
constexpr int64_t aligned_unit(const Shape& shape) {
  return is_short(shape) ? whole_vectors(shape.S) : 1;
}
constexpr bool is_halved(const Shape& shape, int64_t unit) {
  return unit % 2 == 0 && unit / 2 * shape.S >= 8;
}
// Rows of several samples are summed for all channels at once.
constexpr int64_t smallest_unit(const Shape& shape) {
  if (samples_per_summed_row(shape) > 1) return shape.C;
  int64_t unit = aligned_unit(shape);
  while (is_halved(shape, unit)) unit /= 2;
  return unit;
}

// The chunks of a tensor, in memory order. Each is summed by one call of a kernel, or by several
// for different channels; the results are merged in index order.
class Chunks {
 public:
  explicit Chunks(const Shape& shape) : N_(shape.N), S_(shape.S) {
    // Values in the smallest unit. Up to 64 threads with a grain of work each, or more, take 5 to 6
    // units on average, so that the share of none exceeds the mean by 15%.
    const int64_t work = max(kGrain, shape.numel() / 64);
    const int64_t unit = shape.numel() <= kGrain ? kGrain
                         : is_folded(shape)      ? work * 10 / 63
                                                 : work * 10 / 52;
    if (is_short(shape)) {
      // Long enough that the cost per channel of a chunk does not show. Equal pieces, with whole
      // trees of additions (sums.h): multiples of 16 rows where that makes them little longer.
      const int64_t sample = shape.C * S_, joined = samples_per_summed_row(shape);
      const int64_t most = is_folded(shape) ? clamp(131072 / sample, 512, 16384) : 512;
      const int64_t even = max(unit / (smallest_unit(shape) * S_), joined > 1 ? 48 * joined : 16);
      const int64_t step = max(16 * joined * sample <= 4096 ? 16 * joined : 8, sample_unit(shape));
      int64_t count = ceil_div(N_, min(most, even));
      // Two threads that share a chunk of channels-last data would each read half of every row.
      if (S_ == 1 && !is_folded(shape) && N_ >= kDividedRows && count % 2 == 1) ++count;
      samples_ = ceil_div(ceil_div(N_, count), step) * step;
      positions_ = S_;
    } else if (S_ < kRowChunk) {
      // Equal pieces.
      samples_ = ceil_div(N_, ceil_div(N_, clamp(unit / S_, 1, kRowChunk / S_)));
      positions_ = S_;
    } else {
      // Equal pieces, so that no chunk is much smaller; multiples of 64 keep vectors whole.
      positions_ = ceil_div(ceil_div(S_, ceil_div(S_, kRowChunk)), 64) * 64;
    }
    pieces_ = ceil_div(S_, positions_);
    size_ = ceil_div(N_, samples_) * pieces_;
  }

  int64_t size() const { return size_; }
  int64_t pieces() const { return pieces_; }        // per sample; they have consecutive indices
  int64_t samples() const { return samples_; }      // in each chunk, but for the last ones
  int64_t positions() const { return positions_; }  // in each piece, but for the last ones

  Span operator[](int64_t chunk) const {
    const int64_t n0 = chunk / pieces_ * samples_, s0 = chunk % pieces_ * positions_;
    return {n0, min(n0 + samples_, N_), s0, min(s0 + positions_, S_)};
  }

 private:
  static constexpr int64_t kRowChunk = 8192;    // values of a channel where rows are long
  static constexpr int64_t kDividedRows = 128;  // so that halves are worth their cost per column
  int64_t N_, S_, samples_ = 1, positions_ = 1, pieces_ = 0, size_ = 0;
};

// ---- Caches -----------------------------------------------------------------------------------

// Calls that touch at least this many bytes write their outputs with nontemporal stores, past the
// caches. An ordinary store first reads the line that it writes to, and evicts lines that the
// second pass is about to read. Measured beside a last-level cache of 32 MB (bench/NOTES.md, 31). A
// constant, because the cache that the system reports may be shared with other machines.
constexpr int64_t kNontemporalBytes = int64_t{20} << 20;

// tensors: how many of this shape are read and written.
constexpr bool is_nontemporal(const Shape& shape, int64_t element_size, int64_t tensors) {
  return shape.numel() * element_size * tensors >= kNontemporalBytes;
}

// A call with two passes over its inputs, for sums and then for outputs, takes one of two orders.
// Both give the same bits:
//   by cache block  A thread takes a few channels, the cache block, through both passes. In the
//                   second pass their values are still in the core's L2.
//   by chunk        All threads share the first pass, then the second one. For cache blocks that
//                   exceed L2, that do not divide well among the threads, or that would be read in
//                   short strided pieces (channels-last).
constexpr int64_t kCacheBlockBytes = int64_t{512} << 10;  // half of an L2 of 1 MB
constexpr int64_t kCacheBlockChannels = 256;              // at most: their totals are on the stack
constexpr int64_t kContiguousRun = 2048;  // values; longer pieces are not read any faster

// Threads that work on so many elements.
constexpr int64_t working_threads(int64_t elements, int64_t threads) {
  return clamp(ceil_div(elements, kGrain), 1, threads);
}

// Whether a thread that takes the most of `items` has at most 1.1 of the mean. A last item that is
// smaller counts as a whole one.
constexpr bool divides_well(int64_t items, int64_t threads) {
  return 10 * ceil_div(items, threads) * threads <= 11 * items;
}

// Channels per cache block, or 0: by chunk. Without nontemporal stores the order by chunk is
// faster, because the second pass reads the last-level cache linearly (bench/NOTES.md, 16).
// bytes_per_position: of x, or of x and dy; a residual is not counted.
constexpr int64_t cache_block_channels(const Shape& shape, int64_t bytes_per_position,
                                       bool nontemporal, int64_t threads,
                                       bool writes_mask = false) {
  if (shape.numel() <= kGrain) return min(shape.C, kCacheBlockChannels);
  if (is_folded(shape) || !nontemporal) return 0;
  const int64_t working = working_threads(shape.numel(), threads);
  const int64_t fits_in_cache = kCacheBlockBytes / (shape.count() * bytes_per_position);
  const int64_t unit = aligned_unit(shape);
  // Single channels with long rows: even where one exceeds L2, most of its second read hits the
  // cache, because nontemporal stores do not evict it.
  int64_t channels = max(min(min(fits_in_cache, ceil_div(shape.C, working)),
                             min(ceil_div(kContiguousRun, shape.S), kCacheBlockChannels)),
                         is_short(shape) ? 0 : 1);
  if (channels > unit) channels -= channels % unit;
  while (channels > unit && !divides_well(ceil_div(shape.C, channels), working)) channels -= unit;
  if (channels * shape.S < kShortRow || !divides_well(ceil_div(shape.C, channels), working)) {
    return 0;
  }
  // Threads must not share a byte of the mask.
  return writes_mask && is_short(shape) && channels * shape.S % 8 != 0 ? 0 : channels;
}

// How far ahead the second pass prefetches: the same position in the next cache block. In elements.
constexpr int64_t prefetch_distance(const Shape& shape, int64_t block_channels) {
  return block_channels * shape.S;
}

}  // namespace
}  // namespace cpu
}  // namespace bnorm_ext
