// How the work on a tensor is divided: everything that is decided from its shape, its size and the
// number of threads. parallel.h runs the plan with threads, iterate.h goes through one chunk.
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

// Elementwise passes take rows by columns only under this length. Longer short rows are read in
// memory order, which is faster than several strided streams (bench/NOTES.md, 14).
constexpr int64_t kTinyRow = 16;

// Elementwise passes join consecutive rows of fewer vectors than this: the end of one row and the
// beginning of the next make one vector. Longer rows gain nothing by it (bench/NOTES.md, 27).
constexpr int64_t kJoinedVectors = 8;

// Samples shorter than this are folded: several consecutive ones make one row of the matrix.
constexpr int64_t kShortSample = 128;
constexpr bool is_folded(const Shape& shape) {
  return is_short(shape) && shape.C * shape.S < kShortSample;
}
// Samples in a row of the matrix: as many as make whole vectors.
constexpr int64_t samples_per_row(const Shape& shape) {
  if (!is_folded(shape)) return 1;
  const int64_t sample = shape.C * shape.S, whole = whole_vectors(sample);
  return whole * ceil_div(kShortSample, whole * sample);
}

// Columns of a tile, at most: their sums and coefficients stay in L1.
constexpr int64_t kColumns = 2048;
static_assert(16 * (kShortSample - 1) <= kColumns, "a folded row is one tile");
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

// Threads that share a tensor by samples take multiples of this many, for whole bytes of a mask.
constexpr int64_t sample_unit(const Shape& shape) {
  return is_folded(shape) ? 8 : 1;
}

// ---- Chunks -----------------------------------------------------------------------------------

// `moments` and `sums` take at most this many channels per call: their arrays are on the stack.
constexpr int64_t kMaxChannelsPerCall = 2048;

// The chunks of a tensor, in memory order. Each is summed by one call of a kernel; the results are
// merged in index order.
class Chunks {
 public:
  explicit Chunks(const Shape& shape) : N_(shape.N), S_(shape.S) {
    if (is_short(shape)) {
      // Long enough that the cost per channel of a chunk does not show. Equal pieces, multiples of
      // eight samples (MaskRows).
      const int64_t most = clamp(131072 / min(256, shape.C * shape.S), 512, 16384);
      samples_ = ceil_div(ceil_div(N_, ceil_div(N_, most)), 8) * 8;
      positions_ = S_;
    } else if (S_ < kRowChunk) {
      samples_ = ceil_div(N_, ceil_div(N_, kRowChunk / S_));  // equal pieces
      positions_ = S_;
    } else {
      // Equal pieces, so that no chunk is much smaller; multiples of 64 keep vectors whole.
      positions_ = ceil_div(ceil_div(S_, ceil_div(S_, kRowChunk)), 64) * 64;
    }
    pieces_ = ceil_div(S_, positions_);
    size_ = ceil_div(N_, samples_) * pieces_;
  }

  int64_t size() const { return size_; }
  int64_t pieces() const { return pieces_; }  // per sample; they have consecutive indices

  Span operator[](int64_t chunk) const {
    const int64_t n0 = chunk / pieces_ * samples_, s0 = chunk % pieces_ * positions_;
    return {n0, min(n0 + samples_, N_), s0, min(s0 + positions_, S_)};
  }

 private:
  static constexpr int64_t kRowChunk = 8192;  // values of a channel where rows are long
  int64_t N_, S_, samples_ = 1, positions_ = 1, pieces_ = 0, size_ = 0;
};

// ---- Threads and caches -----------------------------------------------------------------------

// Work on fewer elements than about this is faster on one thread.
constexpr int64_t kGrain = 32768;
constexpr int64_t kMergeGrain = 1024;  // the same, in results of chunks that are merged

// Tasks per thread, so that threads that finish early find more work.
constexpr int64_t kTasksPerThread = 4;

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
//                   exceed L2, are fewer than the threads need, or would be read in short strided
//                   pieces (channels-last).
constexpr int64_t kCacheBlockBytes = int64_t{512} << 10;  // half of an L2 of 1 MB
constexpr int64_t kCacheBlockChannels = 256;              // at most: their totals are on the stack
constexpr int64_t kContiguousRun = 2048;  // values; longer pieces are not read any faster

// Channels per cache block, or 0: by chunk. Without nontemporal stores the order by chunk is
// faster, because the second pass reads the last-level cache linearly (bench/NOTES.md, 16).
// bytes_per_position: of x, or of x and dy; a residual is not counted.
constexpr int64_t cache_block_channels(const Shape& shape, int64_t bytes_per_position,
                                       bool nontemporal, int64_t threads,
                                       bool writes_mask = false) {
  if (shape.numel() <= kGrain) return min(shape.C, kCacheBlockChannels);
  if (is_folded(shape) || !nontemporal) return 0;
  const int64_t channel_bytes = shape.count() * bytes_per_position;
  const int64_t fits_in_cache = kCacheBlockBytes / channel_bytes;
  const int64_t leaves_tasks = shape.C / (kTasksPerThread * threads);
  int64_t channels = min(min(fits_in_cache, leaves_tasks),
                         min(ceil_div(kContiguousRun, shape.S), kCacheBlockChannels));
  const int64_t unit = is_short(shape) ? whole_vectors(shape.S) : 1;
  if (channels > unit) channels -= channels % unit;
  // Threads must not share a byte of the mask.
  if (writes_mask && is_short(shape) && channels * shape.S % 8 != 0) return 0;
  if (channels * shape.S >= kShortRow) return channels;
  // Single channels with long rows: even where one exceeds L2, most of its second read hits the
  // cache, because nontemporal stores do not evict it.
  return !is_short(shape) && leaves_tasks > 0 ? 1 : 0;
}

// How far ahead the second pass prefetches: the same position in the next cache block. In elements.
constexpr int64_t prefetch_distance(const Shape& shape, int64_t block_channels) {
  return block_channels * shape.S;
}

// The ranges of channels that each chunk of a pass by chunk is divided into: one range, which reads
// memory in order, or several where there are too few chunks for the threads. Where chunks are
// pieces of a row each channel is a range, so that a thread can continue a row with its next piece.
class ChannelRanges {
 public:
  ChannelRanges(const Shape& shape, const Chunks& chunks, int64_t threads) : C_(shape.C) {
    if (is_short(shape)) unit_ = whole_vectors(shape.S);
    units_ = ceil_div(C_, unit_);
    if (is_folded(shape)) return;
    const int64_t wanted = ceil_div(kTasksPerThread * threads, chunks.size());
    size_ = chunks.pieces() > 1
                ? C_
                : clamp(wanted, ceil_div(units_, kMaxChannelsPerCall / unit_), units_);
  }
  int64_t size() const { return size_; }
  // The first channel of a range; begin(size()) is C. Equal shares, in units that start aligned if
  // the first one does, and at a whole byte of a mask.
  int64_t begin(int64_t range) const { return min(range * units_ / size_ * unit_, C_); }

 private:
  int64_t C_, unit_ = 1, units_, size_ = 1;
};

}  // namespace
}  // namespace cpu
}  // namespace bnorm_ext
