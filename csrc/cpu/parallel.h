// Runs the kernels over a whole tensor with ATen's threads, as plan.h divides it.
#pragma once

#include <ATen/Parallel.h>

#include <cstdint>

#include "capability.h"
#include "plan.h"
#include "scratch.h"

namespace bnorm_ext {
namespace cpu {

// Results of chunks.
template <typename Partial>
using Partials = Scratch<Partial, 2048>;

// Calls f(k, c0, c1) for every chunk k and every range of channels, divided among the threads. Each
// thread's share is the same in every call. It is taken in memory order, or in reverse.
template <typename F>
void for_each_chunk(const Shape& shape, const Chunks& chunks, bool reverse, F f) {
  const ChannelRanges ranges(shape, chunks, at::get_num_threads());
  const int64_t tasks = chunks.size() * ranges.size(), pieces = chunks.pieces();
  const int64_t grain = max(1, kGrain * tasks / shape.numel());
  at::parallel_for(0, tasks, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t task = reverse ? begin + (end - 1 - i) : i;
      const int64_t samples = task / (ranges.size() * pieces), piece = task % pieces;
      const int64_t range = task / pieces % ranges.size();
      f(samples * pieces + piece, ranges.begin(range), ranges.begin(range + 1));
    }
    kernels().fence();
  });
}

// finish(c, total) for every channel, with the total of its chunks' results in index order.
// partials: [K, C]
template <typename Total, typename Partial, typename Finish>
void merge_chunks(const Chunks& chunks, int64_t C, Partials<Partial>& partials, Finish finish) {
  const int64_t K = chunks.size();
  constexpr int64_t kNeighbours = 8;  // channels whose partials share a cache line
  const int64_t grain = max(1, kMergeGrain / (K * kNeighbours));
  at::parallel_for(0, ceil_div(C, kNeighbours), grain, [&](int64_t begin, int64_t end) {
    for (int64_t c0 = begin * kNeighbours; c0 < min(end * kNeighbours, C); c0 += kNeighbours) {
      const int64_t n = min(kNeighbours, C - c0);
      Total totals[kNeighbours];
      for (int64_t k = 0; k < K; ++k) {
        const auto count = static_cast<double>(chunks[k].count());
        for (int64_t i = 0; i < n; ++i) totals[i].add(partials[k * C + c0 + i], count);
      }
      for (int64_t i = 0; i < n; ++i) finish(c0 + i, totals[i]);
    }
  });
}

template <typename Partial, typename Total, typename First, typename Finish, typename Second>
void two_passes_by_cache_block(const Shape& shape, int64_t block_channels, First first,
                               Finish finish, Second second, bool has_second) {
  const Chunks chunks(shape);
  const int64_t C = shape.C, blocks = ceil_div(C, block_channels);
  const int64_t grain = max(1, kGrain / (shape.count() * block_channels));
  at::parallel_for(0, blocks, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t c0 = i * block_channels, c1 = min(c0 + block_channels, C);
      Total totals[kCacheBlockChannels];
      for (int64_t k = 0; k < chunks.size(); ++k) {
        const auto count = static_cast<double>(chunks[k].count());
        Partial partials[kCacheBlockChannels];
        first(chunks[k], c0, c1, partials);
        for (int64_t c = c0; c < c1; ++c) totals[c - c0].add(partials[c - c0], count);
      }
      for (int64_t c = c0; c < c1; ++c) finish(c, totals[c - c0]);
      if (!has_second) continue;
      // Last ones first: they are most likely still in cache.
      for (int64_t k = chunks.size() - 1; k >= 0; --k) second(chunks[k], c0, c1);
    }
    kernels().fence();
  });
}

// first(span, c0, c1, out): computes a Partial for each channel of a chunk.
// finish(c, total): called once per channel, before `second` is called for that channel.
// second(span, c0, c1): writes the outputs of a chunk. has_second: false if only totals are wanted.
// block_channels: of cache_block_channels(), channels per cache block or 0.
template <typename Partial, typename Total, typename First, typename Finish, typename Second>
void two_passes(const Shape& shape, int64_t block_channels, First first, Finish finish,
                Second second, bool has_second) {
  if (block_channels > 0) {
    two_passes_by_cache_block<Partial, Total>(shape, block_channels, first, finish, second,
                                              has_second);
    return;
  }
  const Chunks chunks(shape);
  const int64_t C = shape.C;
  Partials<Partial> partials(chunks.size() * C);
  for_each_chunk(shape, chunks, /*reverse=*/false, [&](int64_t k, int64_t c0, int64_t c1) {
    first(chunks[k], c0, c1, &partials[k * C + c0]);
  });
  merge_chunks<Total>(chunks, C, partials, finish);
  if (!has_second) return;
  // Last ones first: they are most likely still in cache.
  for_each_chunk(shape, chunks, /*reverse=*/true,
                 [&](int64_t k, int64_t c0, int64_t c1) { second(chunks[k], c0, c1); });
}

// second(span, c0, c1) over the whole tensor in memory order, for passes that need no totals.
template <typename Second>
void one_pass(const Shape& shape, Second second) {
  const int64_t unit = sample_unit(shape), units = ceil_div(shape.N, unit);
  if (units >= kTasksPerThread * at::get_num_threads()) {
    const int64_t grain = max(1, kGrain / (shape.C * shape.S * unit));
    at::parallel_for(0, units, grain, [&](int64_t begin, int64_t end) {
      second(Span{begin * unit, min(end * unit, shape.N), 0, shape.S}, 0, shape.C);
      kernels().fence();
    });
    return;
  }
  const Chunks chunks(shape);
  for_each_chunk(shape, chunks, /*reverse=*/false,
                 [&](int64_t k, int64_t c0, int64_t c1) { second(chunks[k], c0, c1); });
}

}  // namespace cpu
}  // namespace bnorm_ext
