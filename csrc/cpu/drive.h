// Runs the chunk kernels over a whole tensor with ATen's threads.
//
// Two ways through the memory, chosen by shape and threads, with the same bits in either:
//   by channel  (ChannelsFirst, enough channels) one thread takes a channel, or some whose rows are
//               short, through both passes: its slab is still in the core's L2 in the second
//   by chunk    (ChannelsLast, or too few channels) all threads share the chunks of the first pass,
//               then those of the second, last ones first since they are the ones still in cache
#pragma once

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <vector>

#include "capability.h"
#include "huge_pages.h"

namespace bnorm_ext {
namespace cpu {

// Below about this many elements a thread costs more than it saves.
constexpr int64_t kGrain = 32768;

// Outputs of at least this many bytes are written past the caches: a store into a line that is not
// cached would first read it, and evict the slab that the second pass is about to read. A constant,
// since what the system reports as last-level cache may be shared by any number of machines.
constexpr int64_t kStreamBytes = int64_t{16} << 20;

inline bool streams(const at::Tensor& out) {
  return out.defined() && static_cast<int64_t>(out.nbytes()) >= kStreamBytes;
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
  double mean() const { return origin_ + d_ / count_; }
  double var() const {
    const double v = (d2_ - d_ * d_ / count_) / count_;
    return v < 0 ? 0 : v;  // not std::max: a NaN must stay one
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

// Whether one thread takes a channel through both passes.
inline bool by_channel(const Shape& shape) {
  if (shape.layout == Layout::ChannelsLast) return false;
  const int64_t threads = at::get_num_threads();
  return shape.numel() <= kGrain || threads == 1 || shape.C >= 4 * threads;
}

// How many channels one thread takes through both passes at once: several where rows are short, so
// that it reads runs of memory, as long as all that it reads stays in half of an L2 of 1 MB.
inline int64_t channel_group(const Shape& shape, int64_t bytes_per_position) {
  constexpr int64_t kShortRow = 256;
  if (shape.S >= kShortRow || shape.layout == Layout::ChannelsLast) return 1;
  const int64_t slab = std::max<int64_t>(1, shape.count() * bytes_per_position);
  const int64_t fair = shape.C / (4 * at::get_num_threads());
  return std::clamp<int64_t>(std::min((int64_t{512} << 10) / slab, fair), 1, kChannelGroup);
}

// How far ahead to fetch in the second pass: rows of a channel are followed in memory by those of
// the next one, which the same thread reads next. Not where L2 could not keep them until then.
inline int64_t fetch_distance(const Shape& shape, int64_t bytes_per_position) {
  if (!by_channel(shape) || shape.count() * bytes_per_position > (1 << 20)) return 0;
  return channel_group(shape, bytes_per_position) * shape.S;
}

// first(span, c0, c1, out): gathers a Partial of each channel of the chunk.
// finish(c, total): called once per channel, before `second` sees the channel.
// second(span, c0, c1): writes the chunk. `has_second` is false where only totals are wanted.
// bytes_per_position: of all that `first` reads.
template <typename Partial, typename Total, typename First, typename Finish, typename Second>
void two_passes(const Shape& shape, const Chunks& chunks, int64_t bytes_per_position, First first,
                Finish finish, Second second, bool has_second) {
  // The second pass goes backwards in short steps, so that it meets what is still in the cache.
  const Chunks steps(shape, kForwardChunk);
  const int64_t L = steps.size();
  const int64_t C = shape.C, K = chunks.size(), per_channel = shape.count();
  const bool by_row = shape.layout == Layout::ChannelsLast;
  const bool alone = shape.numel() <= kGrain;

  if (by_channel(shape)) {
    const int64_t G = channel_group(shape, bytes_per_position), groups = (C + G - 1) / G;
    const int64_t grain = std::max<int64_t>(1, kGrain / (per_channel * G));
    at::parallel_for(0, groups, grain, [&](int64_t begin, int64_t end) {
      for (int64_t group = begin; group < end; ++group) {
        const int64_t c0 = group * G, c1 = std::min(c0 + G, C);
        Total totals[kChannelGroup];
        for (int64_t k = 0; k < K; ++k) {
          Partial partials[kChannelGroup];
          first(chunks[k], c0, c1, partials);
          const double count = static_cast<double>(chunks[k].count());
          for (int64_t c = c0; c < c1; ++c) totals[c - c0].add(partials[c - c0], count);
        }
        for (int64_t c = c0; c < c1; ++c) finish(c, totals[c - c0]);
        if (!has_second) continue;
        for (int64_t k = L - 1; k >= 0; --k) second(steps[k], c0, c1);
      }
      kernels().fence();
    });
    return;
  }

  const int64_t block = by_row ? kChannelBlock : 1;
  const int64_t blocks = (C + block - 1) / block;
  const int64_t grain = alone ? K * blocks : 1;
  std::vector<Partial> partials(static_cast<size_t>(K * C));
  at::parallel_for(0, K * blocks, grain, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t k = task / blocks, c0 = task % blocks * block;
      first(chunks[k], c0, std::min(c0 + block, C), &partials[static_cast<size_t>(k * C + c0)]);
    }
  });
  // Eight neighbours at a time, because their partials share cache lines.
  constexpr int64_t kNeighbours = 8;
  const int64_t finish_grain = std::max<int64_t>(kNeighbours, kGrain / std::max<int64_t>(K, 1));
  at::parallel_for(0, (C + kNeighbours - 1) / kNeighbours, finish_grain / kNeighbours,
                   [&](int64_t begin, int64_t end) {
                     for (int64_t c0 = begin * kNeighbours; c0 < std::min(end * kNeighbours, C);
                          c0 += kNeighbours) {
                       const int64_t n = std::min(kNeighbours, C - c0);
                       Total totals[kNeighbours];
                       for (int64_t k = 0; k < K; ++k) {
                         const double count = static_cast<double>(chunks[k].count());
                         for (int64_t i = 0; i < n; ++i) {
                           totals[i].add(partials[static_cast<size_t>(k * C + c0 + i)], count);
                         }
                       }
                       for (int64_t i = 0; i < n; ++i) finish(c0 + i, totals[i]);
                     }
                   });
  if (!has_second) return;
  const int64_t second_blocks = by_row ? 1 : C;
  at::parallel_for(0, L * second_blocks, alone ? L * second_blocks : 1,
                   [&](int64_t begin, int64_t end) {
                     for (int64_t task = end - 1; task >= begin; --task) {
                       const int64_t c0 = task % second_blocks;
                       second(steps[task / second_blocks], c0, by_row ? C : c0 + 1);
                     }
                     kernels().fence();
                   });
}

// second(span, c0, c1) over every chunk, in order: for passes that need no totals.
template <typename Second>
void one_pass(const Shape& shape, Second second) {
  const Chunks chunks(shape, kForwardChunk);
  const bool by_row = shape.layout == Layout::ChannelsLast;
  const int64_t K = chunks.size(), channels = by_row ? 1 : shape.C, tasks = K * channels;
  const int64_t grain = tasks == 0 ? 1 : std::max<int64_t>(1, kGrain * tasks / shape.numel());
  at::parallel_for(0, tasks, grain, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      // Sample by sample where a chunk is one row, so that memory is walked in order.
      const int64_t c0 = task % channels;
      second(chunks[task / channels], c0, by_row ? shape.C : c0 + 1);
    }
    kernels().fence();
  });
}

}  // namespace cpu
}  // namespace bnorm_ext
