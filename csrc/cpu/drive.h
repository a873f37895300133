// Runs the chunk kernels over a whole tensor with ATen's threads.
//
// Two ways through the memory, chosen by shape and threads, with the same bits in either:
//   by slab   one thread takes a group of channels through both passes: all their values, the slab,
//             are still in the core's L2 in the second
//   by chunk  where slabs are too large or too few, or would be read in crumbs (channels-last): all
//             threads share the chunks of the first pass, then those of the second, last ones first
//             since they are the ones still in cache
#pragma once

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <memory>

#include "../params.h"
#include "../variance.h"
#include "capability.h"
#include "huge_pages.h"

namespace bnorm_ext {
namespace cpu {

// Below about this many elements a thread costs more than it saves.
constexpr int64_t kGrain = 32768;
constexpr int64_t kFinishGrain = 1024;  // partials that are merged

// Where a call touches at least this many bytes, its outputs are written past the caches: a store
// into a line that is not cached would first read it, and evict what the second pass is about to
// read. Found beside a last-level cache of 32 MB (bench/NOTES.md, 31). A constant, since what the
// system reports as one may be shared by any number of machines.
constexpr int64_t kStreamBytes = int64_t{20} << 20;

// tensors: how many of out's size are read and written.
inline bool streams(const at::Tensor& out, int64_t tensors) {
  return out.defined() && tensors * static_cast<int64_t>(out.nbytes()) >= kStreamBytes;
}

// The moments of one channel, from those of its chunks in index order. Deviations are taken from
// the first chunk's shift; in double this loses at most log2(number of chunks) + 1 of 53 bits.
class ChannelMoments {
 public:
  void add(const Moments& chunk, double count) {
    if (count_ == 0 && chunk.shift - chunk.shift == 0) origin_ = chunk.shift;
    const double d = (chunk.shift - origin_) + chunk.delta;
    count_ += count;
    d_ += count * d;
    d2_ += chunk.m2 + count * d * d;
  }
  struct MeanVar {
    double mean, var;
  };
  MeanVar result() const {
    const double per_value = 1 / count_, d = d_ * per_value, v = d2_ * per_value - d * d;
    return {origin_ + d, clamp_variance(v)};
  }

 private:
  double count_ = 0, origin_ = 0, d_ = 0, d2_ = 0;
};

class ChannelSums {
 public:
  void add(const Sums& chunk, double) {
    dy += chunk.dy;
    dy_xhat += chunk.dy_xhat;
  }
  double dy = 0, dy_xhat = 0;
};

constexpr int64_t kSlabBytes = int64_t{512} << 10;  // half of an L2 of 1 MB
constexpr int64_t kSlabChannels = 256;              // their totals are on the stack
constexpr int64_t kRun = 2048;  // values in a row of memory that are worth while going for

// Channels per slab, or 0 where chunks are the better way: linear passes through the last-level
// cache are, up to the size from which the output is streamed (bench/NOTES.md, 16). bytes: per
// position, of x, or of x and dy; a residual is not counted.
inline int64_t slab_channels(const Shape& shape, int64_t bytes, bool stream, bool masked = false) {
  if (shape.numel() <= kGrain) return std::min(shape.C, kSlabChannels);
  if (is_folded(shape) || !stream) return 0;
  const int64_t threads = at::get_num_threads(), slab = shape.count() * bytes;
  const int64_t unit = is_short(shape) ? whole_vectors(shape.S) : 1;
  int64_t group = std::min(
      {kSlabBytes / slab, shape.C / (4 * threads), ceil_div(kRun, shape.S), kSlabChannels});
  if (group > unit) group -= group % unit;
  // Threads must not share a byte of the mask.
  if (masked && is_short(shape) && group * shape.S % 8 != 0) return 0;
  if (group * shape.S >= kShortRow) return group;
  // Streaming leaves the cache to what is read; most of a slab that is too large still hits it.
  return !is_short(shape) && shape.C >= 4 * threads ? 1 : 0;
}

// The channels of a task of a pass by chunks: all, so that memory is read in order, unless that
// leaves threads without work, or rows are in pieces, each followed by the next one of its row.
class Blocks {
 public:
  Blocks(const Shape& shape, const Chunks& chunks) : C_(shape.C) {
    if (is_short(shape)) unit_ = whole_vectors(shape.S);
    units_ = ceil_div(C_, unit_);
    if (is_folded(shape)) return;
    const int64_t wanted = ceil_div(4 * at::get_num_threads(), chunks.size());
    size_ = chunks.pieces() > 1
                ? C_
                : std::clamp(wanted, ceil_div(units_, kChannelBlock / unit_), units_);
  }
  int64_t size() const { return size_; }
  // The first channel of a block, or the end: equal shares, in units that start aligned where the
  // first one does and share no byte of a mask.
  int64_t begin(int64_t block) const { return std::min(block * units_ / size_ * unit_, C_); }

 private:
  int64_t C_, unit_ = 1, units_, size_ = 1;
};

// Room for K * C partials, not initialised; on the stack for usual sizes.
template <typename Partial>
class Partials {
 public:
  explicit Partials(int64_t count) {
    if (count > kOnStack) heap_.reset(new Partial[static_cast<size_t>(count)]);
    data_ = heap_ ? heap_.get() : stack_;
  }
  Partial& operator[](int64_t i) { return data_[i]; }

 private:
  static constexpr int64_t kOnStack = 2048;
  Partial stack_[kOnStack];
  std::unique_ptr<Partial[]> heap_;
  Partial* data_;
};

// Calls f(k, c0, c1) for every chunk and block of channels, shared by the threads. Each thread's
// share is the same in every call, and in the order of memory, or against it.
template <typename F>
void each_block(const Shape& shape, const Chunks& chunks, bool backwards, F f) {
  const Blocks blocks(shape, chunks);
  const int64_t tasks = chunks.size() * blocks.size(), pieces = chunks.pieces();
  const int64_t grain = std::max<int64_t>(1, kGrain * tasks / shape.numel());
  at::parallel_for(0, tasks, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t task = backwards ? begin + (end - 1 - i) : i;
      const int64_t samples = task / (blocks.size() * pieces), piece = task % pieces;
      const int64_t block = task / pieces % blocks.size();
      f(samples * pieces + piece, blocks.begin(block), blocks.begin(block + 1));
    }
    kernels().fence();
  });
}

// first(span, c0, c1, out): gathers a Partial of each channel of the chunk.
// finish(c, total): called once per channel, before `second` sees the channel.
// second(span, c0, c1): writes the chunk. `has_second` is false where only totals are wanted.
// slab: channels per slab, or 0.
template <typename Partial, typename Total, typename First, typename Finish, typename Second>
void two_passes(const Shape& shape, int64_t slab, First first, Finish finish, Second second,
                bool has_second) {
  const Chunks chunks(shape);
  const int64_t C = shape.C, K = chunks.size();
  const auto count = [&](int64_t k) { return static_cast<double>(chunks[k].count()); };

  if (slab > 0) {
    const int64_t slabs = ceil_div(C, slab);
    const int64_t grain = std::max<int64_t>(1, kGrain / (shape.count() * slab));
    at::parallel_for(0, slabs, grain, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t c0 = i * slab, c1 = std::min(c0 + slab, C);
        Total totals[kSlabChannels];
        for (int64_t k = 0; k < K; ++k) {
          Partial partials[kSlabChannels];
          first(chunks[k], c0, c1, partials);
          for (int64_t c = c0; c < c1; ++c) totals[c - c0].add(partials[c - c0], count(k));
        }
        for (int64_t c = c0; c < c1; ++c) finish(c, totals[c - c0]);
        if (!has_second) continue;
        for (int64_t k = K - 1; k >= 0; --k) second(chunks[k], c0, c1);
      }
      kernels().fence();
    });
    return;
  }

  Partials<Partial> partials(K * C);
  each_block(shape, chunks, /*backwards=*/false, [&](int64_t k, int64_t c0, int64_t c1) {
    first(chunks[k], c0, c1, &partials[k * C + c0]);
  });
  // Eight neighbours at a time, because their partials share cache lines.
  constexpr int64_t kNeighbours = 8;
  at::parallel_for(0, ceil_div(C, kNeighbours),
                   std::max<int64_t>(1, kFinishGrain / (K * kNeighbours)),
                   [&](int64_t begin, int64_t end) {
                     for (int64_t c0 = begin * kNeighbours; c0 < std::min(end * kNeighbours, C);
                          c0 += kNeighbours) {
                       const int64_t n = std::min(kNeighbours, C - c0);
                       Total totals[kNeighbours];
                       for (int64_t k = 0; k < K; ++k) {
                         for (int64_t i = 0; i < n; ++i)
                           totals[i].add(partials[k * C + c0 + i], count(k));
                       }
                       for (int64_t i = 0; i < n; ++i) finish(c0 + i, totals[i]);
                     }
                   });
  if (!has_second) return;
  each_block(shape, chunks, /*backwards=*/true,
             [&](int64_t k, int64_t c0, int64_t c1) { second(chunks[k], c0, c1); });
}

// second(span, c0, c1) over everything, for passes that need no totals: in the order of memory.
template <typename Second>
void one_pass(const Shape& shape, Second second) {
  const int64_t unit = is_folded(shape) ? 8 : 1;  // samples: of a mask, whole bytes
  const int64_t units = ceil_div(shape.N, unit), shares = 4 * at::get_num_threads();
  if (units >= shares) {
    const int64_t grain = std::max<int64_t>(1, kGrain / (shape.C * shape.S * unit));
    at::parallel_for(0, units, grain, [&](int64_t begin, int64_t end) {
      second(Span{begin * unit, std::min(end * unit, shape.N), 0, shape.S}, 0, shape.C);
      kernels().fence();
    });
    return;
  }
  const Chunks chunks(shape);
  each_block(shape, chunks, /*backwards=*/false,
             [&](int64_t k, int64_t c0, int64_t c1) { second(chunks[k], c0, c1); });
}

}  // namespace cpu
}  // namespace bnorm_ext
