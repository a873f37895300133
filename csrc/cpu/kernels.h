// The table of the vectorised CPU kernels: one per instruction set, the best one chosen at run
// time.
//
// A kernel is single-threaded and works on one chunk of a range of channels. Chunks depend on the
// shape alone, never on the number of threads, and are merged in index order by the caller: that
// is what makes results independent of the number of threads. Free of torch headers.
#pragma once

#include <cstdint>

#include "../params.h"

namespace bnorm_ext {
namespace cpu {

// In an unnamed namespace, as all that kernels use: see vec.h.
namespace {

// The kernels know one layout: element (n, c, s) at (n * C + c) * S + s. ChannelsLast is the case
// of N * S samples with one position each.
constexpr Shape as_channels_first(const Shape& shape) {
  if (shape.layout == Layout::ChannelsFirst) return shape;
  return {shape.N * shape.S, shape.C, 1, Layout::ChannelsFirst};
}

constexpr int64_t min(int64_t a, int64_t b) {
  return a < b ? a : b;
}
constexpr int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}
constexpr int64_t clamp(int64_t v, int64_t lo, int64_t hi) {
  return v < lo ? lo : v > hi ? hi : v;
}

// The least number of pieces of `length` values that is a multiple of 16 values, the widest vector.
constexpr int64_t whole_vectors(int64_t length) {
  int64_t pieces = 16;
  for (; length % 2 == 0 && pieces > 1; length /= 2) pieces /= 2;
  return pieces;
}

// Rows of a channel shorter than this are taken across the samples (walk.h): sixteen vectors of the
// widest kind, below which what a row costs at its ends is felt.
constexpr int64_t kShortRow = 256;
constexpr bool is_short(const Shape& shape) {
  return shape.S < kShortRow;
}

// Samples shorter than this are joined, `fold` of them, into rows of whole vectors.
constexpr int64_t kShortSample = 128;
constexpr bool is_folded(const Shape& shape) {
  return is_short(shape) && shape.C * shape.S < kShortSample;
}
constexpr int64_t fold(int64_t sample) {
  const int64_t whole = whole_vectors(sample);
  return whole * ceil_div(kShortSample, whole * sample);
}

// Columns that are taken at once: their sums and coefficients stay in L1.
constexpr int64_t kColumns = 2048;
static_assert(16 * (kShortSample - 1) <= kColumns, "a folded row is one tile");

// Channels per tile: as many as fit, their elements a multiple of 16, so that all tiles are aligned
// where the first one is; of 8, where only that fits, so that the bits of a mask are whole bytes.
constexpr int64_t tile_channels(int64_t S) {
  const int64_t whole = whole_vectors(S), fit = kColumns / S;
  return fit < whole ? fit / 8 * 8 : fit / whole * whole;
}
static_assert(kColumns / (kShortRow - 1) >= 8, "a tile has eight channels at least");

constexpr int64_t kMaskSlack = 8;  // bytes

// A mask has one bit for each element, in the order of memory, in rows that start at whole bytes:
// as long as what one thread is sure to write alone, a row of a channel where these are long, a
// sample where they are short, everything where samples are joined (chunks are of whole eights of
// samples). Behind the last one are the bytes that reading eight at a time may touch.
class MaskRows {
 public:
  explicit constexpr MaskRows(const Shape& shape)
      : N_(shape.N),
        C_(shape.C),
        S_(shape.S),
        per_sample_(is_short(shape)),
        padding_(is_folded(shape) ? 0 : (8 - (per_sample_ ? C_ * S_ : S_) % 8) % 8) {}
  // The bit of the element at `at`, which is in sample n and channel c.
  constexpr int64_t bit(int64_t at, int64_t n, int64_t c) const {
    return at + padding_ * (per_sample_ ? n : n * C_ + c);
  }
  // Bits behind each sample that is short.
  constexpr int64_t padding() const { return padding_; }
  constexpr int64_t bytes() const {
    return ceil_div(bit(N_ * C_ * S_, per_sample_ ? N_ : N_ - 1, C_), 8) + kMaskSlack;
  }

 private:
  int64_t N_, C_, S_;
  bool per_sample_;
  int64_t padding_;
};

// Channels that `moments` and `sums` are asked for at a time, at most.
constexpr int64_t kChannelBlock = 2048;

}  // namespace

// An element, and its bit in a mask.
struct Place {
  int64_t at, bit;
  constexpr Place operator+(int64_t elements) const { return {at + elements, bit + elements}; }
};

// The positions that one chunk covers: samples [n0, n1), positions [s0, s1) of each.
struct Span {
  int64_t n0, n1, s0, s1;
  int64_t count() const { return (n1 - n0) * (s1 - s0); }
};

// A tensor's chunks, in the order of memory.
class Chunks {
 public:
  explicit Chunks(const Shape& shape) : N_(shape.N), S_(shape.S) {
    if (is_short(shape)) {
      // Long enough that what a chunk costs per channel does not show. Equal pieces, whole eights.
      const int64_t most = clamp(131072 / min(256, shape.C * shape.S), 512, 16384);
      samples_ = ceil_div(ceil_div(N_, ceil_div(N_, most)), 8) * 8;
      positions_ = S_;
    } else if (S_ < kRowChunk) {
      samples_ = ceil_div(N_, ceil_div(N_, kRowChunk / S_));  // equal pieces
      positions_ = S_;
    } else {
      // Equal pieces, so that no chunk is a sliver; multiples of 64 keep vectors whole.
      positions_ = ceil_div(ceil_div(S_, ceil_div(S_, kRowChunk)), 64) * 64;
    }
    pieces_ = ceil_div(S_, positions_);
    size_ = ceil_div(N_, samples_) * pieces_;
  }

  int64_t size() const { return size_; }
  int64_t pieces() const { return pieces_; }  // of a sample; they follow each other

  Span operator[](int64_t chunk) const {
    const int64_t n0 = chunk / pieces_ * samples_, s0 = chunk % pieces_ * positions_;
    return {n0, min(n0 + samples_, N_), s0, min(s0 + positions_, S_)};
  }

 private:
  static constexpr int64_t kRowChunk = 8192;  // values of a channel where rows are long
  int64_t N_, S_, samples_ = 1, positions_ = 1, pieces_ = 0, size_ = 0;
};

// Of one chunk of one channel: the mean as shift + delta, and the sum of squared deviations from
// it. In two parts because a mean far from zero has no place for all digits of the small one.
struct Moments {
  double shift;
  double delta;
  double m2;
};

// Of one chunk of one channel, with xhat = (x - mean) * rstd.
struct Sums {
  double dy;
  double dy_xhat;
};

struct KernelTable {
  const char* capability;  // "baseline", "avx2" or "avx512"
  // Indexed by DType. out: [c1 - c0]. moments and sums take at most kChannelBlock channels at a
  // time; apply and dx any range. All of them take all channels where is_folded().
  void (*moments[4])(const ForwardParams&, const Span&, int64_t c0, int64_t c1, Moments* out);
  void (*apply[4])(const ForwardParams&, const Span&, int64_t c0, int64_t c1);
  void (*sums[4])(const BackwardParams&, const Span&, int64_t c0, int64_t c1, Sums* out);
  void (*dx[4])(const BackwardParams&, const Span&, int64_t c0, int64_t c1);
  // Makes what this thread streamed visible; after its last chunk, since it waits for the memory.
  void (*fence)();
};

extern const KernelTable kernels_baseline;
// Compiled on x86-64 only, where BNORM_EXT_X86_KERNELS is defined for the host files.
extern const KernelTable kernels_avx2;
extern const KernelTable kernels_avx512;

}  // namespace cpu
}  // namespace bnorm_ext
