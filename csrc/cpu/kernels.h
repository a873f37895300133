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

// Values per chunk and channel in ChannelsFirst. Forward: 16 KB of float, which stays in L1 between
// the two passes over it. Backward goes over it once: long, for each start and end of a chunk
// costs.
constexpr int64_t kForwardChunk = 4096;
constexpr int64_t kBackwardChunk = 8192;
// Channels of short rows that are taken together in ChannelsFirst, so that memory is read in runs;
// their accumulators stay in L1.
constexpr int64_t kChannelGroup = 16;
// Channels-last moments are gathered for this many channels at a time, in arrays on the stack.
constexpr int64_t kChannelBlock = 128;

// The positions that one chunk covers. ChannelsFirst: samples [n0, n1), positions [s0, s1) of each.
// ChannelsLast: rows [s0, s1) of the N * S rows, and n0 = 0, n1 = 1.
struct Span {
  int64_t n0, n1, s0, s1;
  int64_t count() const { return (n1 - n0) * (s1 - s0); }
};

class Chunks {
 public:
  Chunks(const Shape& shape, int64_t length) {
    if (shape.layout == Layout::ChannelsLast) {
      const int64_t width = shape.C < kChannelBlock ? shape.C : kChannelBlock;
      outer_ = 1;
      inner_ = shape.N * shape.S;
      inner_step_ = clamp(4 * kForwardChunk / (width > 0 ? width : 1), 128, 1024);
    } else if (shape.S < length) {
      outer_ = shape.N;
      inner_ = shape.S;
      outer_step_ = length / (shape.S > 0 ? shape.S : 1);
      inner_step_ = shape.S > 0 ? shape.S : 1;
    } else {
      // Equal pieces, so that no chunk is a sliver; multiples of 64 keep vectors whole.
      outer_ = shape.N;
      inner_ = shape.S;
      const int64_t pieces = ceil_div(shape.S, length);
      inner_step_ = ceil_div(ceil_div(shape.S, pieces), 64) * 64;
    }
    inner_chunks_ = ceil_div(inner_, inner_step_);
    size_ = ceil_div(outer_, outer_step_) * inner_chunks_;
  }

  int64_t size() const { return size_; }

  Span operator[](int64_t chunk) const {
    const int64_t n0 = chunk / inner_chunks_ * outer_step_;
    const int64_t s0 = chunk % inner_chunks_ * inner_step_;
    return {n0, min(n0 + outer_step_, outer_), s0, min(s0 + inner_step_, inner_)};
  }

 private:
  static constexpr int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
  static constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
  static constexpr int64_t clamp(int64_t v, int64_t lo, int64_t hi) {
    return v < lo ? lo : v > hi ? hi : v;
  }

  int64_t outer_ = 1, outer_step_ = 1;
  int64_t inner_ = 0, inner_step_ = 1;
  int64_t inner_chunks_ = 0, size_ = 0;
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
  // time, in ChannelsFirst kChannelGroup; apply and dx any range.
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
