// Runs the kernels over a whole tensor with ATen's threads, as plan.h and division.h divide it.
#pragma once

#include <ATen/Parallel.h>

#include <cstdint>

#include "capability.h"
#include "division.h"
#include "plan.h"
#include "scratch.h"

namespace bnorm_ext {
namespace cpu {

// Results of chunks.
template <typename Partial>
using Partials = Scratch<Partial, 2048>;

// Calls f(begin, end) for pieces of [0, count) of at least `grain`, one a thread. Not
// at::parallel_for: its first call in a thread sets that thread's number of threads to what any
// thread set last. ATen guards against that with a flag, of which each shared library has its own.
template <typename F>
void parallel_for(int64_t count, int64_t grain, const F& f) {
#ifdef INTRA_OP_PARALLEL  // by ATen's headers, where torch and this build have threads
  if (count > grain && !at::in_parallel_region() && at::get_num_threads() > 1) {
    at::internal::invoke_parallel(0, count, grain, f);
    return;
  }
#endif
  if (count > 0) f(0, count);
}

// Calls f(t) for every thread t of `threads`.
template <typename F>
void for_each_thread(int64_t threads, F f) {
  parallel_for(threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) f(t);
    kernels().fence();
  });
}

constexpr int64_t kMergeGrain = 1024;  // results of chunks that are worth a thread

// finish(c, total) for every channel, with the total of its chunks' results in index order.
// partials: [K, C]
template <typename Total, typename Partial, typename Finish>
void merge_chunks(const Chunks& chunks, int64_t C, Partials<Partial>& partials, Finish finish) {
  const int64_t K = chunks.size();
  constexpr int64_t kNeighbours = 8;  // channels whose partials share a cache line
  const int64_t grain = max(1, kMergeGrain / (K * kNeighbours));
  parallel_for(ceil_div(C, kNeighbours), grain, [&](int64_t begin, int64_t end) {
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
  const int64_t threads = working_threads(shape.numel(), at::get_num_threads());
  for_each_thread(threads, [&](int64_t t) {
    for (int64_t i = blocks * t / threads; i < blocks * (t + 1) / threads; ++i) {
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
  });
}

// In reverse, passes go from the end on in blocks of about so many elements: what the pass before has
// read last is still in a core's L2.
constexpr int64_t kReversedBlock = 32768;

// second(span, c0, c1) for the samples of a span, in blocks.
template <typename Second>
void reversed(const Shape& shape, const Span& span, int64_t c0, int64_t c1, Second second) {
  if (span.n0 == span.n1) return;
  const int64_t unit = max(32, sample_unit(shape));
  const int64_t block = max(1, kReversedBlock / ((c1 - c0) * shape.S * unit)) * unit;
  // Blocks start at multiples of the unit from the first sample on.
  for (int64_t n = (span.n1 - span.n0 - 1) / block * block + span.n0; n >= span.n0; n -= block) {
    second(Span{n, min(n + block, span.n1), span.s0, span.s1}, c0, c1);
  }
}

// second(span, c0, c1) over the whole tensor where it needs no results of other threads. Each
// thread's share, and the caches that hold it, are about those of the chunks.
template <typename Second>
void by_samples(const Shape& shape, const SampleDivision& division, bool reverse, Second second) {
  for_each_thread(division.threads(), [&](int64_t t) {
    const Span span{division.begin(t), division.begin(t + 1), 0, shape.S};
    if (reverse) {
      reversed(shape, span, 0, shape.C, second);
    } else if (span.n0 < span.n1) {
      second(span, 0, shape.C);
    }
  });
}

// The same, as the chunks are divided among the threads.
template <typename Second>
void by_chunk(const Shape& shape, const Division& division, bool reverse, Second second) {
  for_each_thread(division.threads(), [&](int64_t t) {
    division.for_each(t, reverse, [&](int64_t k, int64_t c0, int64_t c1) {
      // Rows of several positions are summed by groups of channels: their last samples are not what
      // was read last.
      if (reverse && shape.S == 1) {
        reversed(shape, division.span(k), c0, c1, second);
      } else {
        second(division.span(k), c0, c1);
      }
    });
  });
}

// first(span, c0, c1, out): computes a Partial for each channel of a chunk.
// finish(c, total): called once per channel, before `second` is called for that channel.
// second(span, c0, c1): writes the outputs of a chunk. has_second: false if only totals are wanted.
// writes_mask: `second` writes a mask.
// block_channels: of cache_block_channels(), channels per cache block or 0.
template <typename Partial, typename Total, typename First, typename Finish, typename Second>
void two_passes(const Shape& shape, int64_t block_channels, bool writes_mask, First first,
                Finish finish, Second second, bool has_second) {
  if (block_channels > 0) {
    two_passes_by_cache_block<Partial, Total>(shape, block_channels, first, finish, second,
                                              has_second);
    return;
  }
  const Chunks chunks(shape);
  const int64_t C = shape.C, threads = at::get_num_threads();
  Partials<Partial> partials(chunks.size() * C);
  const Division division(shape, chunks, threads, /*whole_bytes=*/false);
  for_each_thread(division.threads(), [&](int64_t t) {
    division.for_each(t, /*reverse=*/false, [&](int64_t k, int64_t c0, int64_t c1) {
      first(chunks[k], c0, c1, &partials[k * C + c0]);
    });
  });
  merge_chunks<Total>(chunks, C, partials, finish);
  if (!has_second) return;
  // Last ones first: they are most likely still in cache.
  if (is_folded(shape)) {
    by_samples(shape, SampleDivision(shape, threads), /*reverse=*/true, second);
  } else {
    by_chunk(shape, writes_mask ? Division(shape, chunks, threads, true) : division,
             /*reverse=*/true, second);
  }
}

// second(span, c0, c1) over the whole tensor in memory order, for passes that need no totals.
template <typename Second>
void one_pass(const Shape& shape, bool writes_mask, Second second) {
  const int64_t threads = at::get_num_threads();
  const SampleDivision samples(shape, threads);
  if (is_folded(shape) || samples.is_even()) {
    by_samples(shape, samples, /*reverse=*/false, second);
    return;
  }
  by_chunk(shape, Division(shape, Chunks(shape), threads, writes_mask), /*reverse=*/false, second);
}

}  // namespace cpu
}  // namespace bnorm_ext
