// How evenly csrc/cpu/plan.h divides the work of a call among threads.
//
// Reads lines "N C S layout element_bytes" from stdin, layout being 0 (channels first) or 1
// (channels last). For each, for 1 to 64 threads and each kind of pass, prints
//   kind threads working busiest
// with `working`, how many threads take part, and `busiest`, the elements of the thread that has
// most, over the elements of a thread if all that take part had the same.
#include <cpu/plan.h>

#include <cstdio>
#include <vector>

using namespace bnorm_ext;
using namespace bnorm_ext::cpu;

namespace {

// at::parallel_for: as many threads as there are grains, each with as many whole tasks as fit.
template <typename Cost>
void divided(const char* kind, int64_t tasks, int64_t grain, int64_t threads, Cost cost) {
  const int64_t used = min(threads, ceil_div(tasks, grain));
  const int64_t each = ceil_div(tasks, used);
  double busiest = 0, total = 0;
  int64_t working = 0;
  for (int64_t begin = 0; begin < tasks; begin += each, ++working) {
    double mine = 0;
    for (int64_t i = begin; i < min(begin + each, tasks); ++i) mine += cost(i);
    total += mine;
    if (mine > busiest) busiest = mine;
  }
  std::printf("%s %ld %ld %.4f\n", kind, static_cast<long>(threads), static_cast<long>(working),
              busiest * static_cast<double>(working) / total);
}

void by_chunk(const char* kind, const Shape& shape, int64_t threads) {
  const Chunks chunks(shape);
  const ChannelRanges ranges(shape, chunks, threads);
  const int64_t tasks = chunks.size() * ranges.size(), pieces = chunks.pieces();
  divided(kind, tasks, max(1, kGrain * tasks / shape.numel()), threads, [&](int64_t task) {
    const int64_t samples = task / (ranges.size() * pieces), piece = task % pieces;
    const int64_t range = task / pieces % ranges.size();
    return static_cast<double>(chunks[samples * pieces + piece].count()) *
           static_cast<double>(ranges.begin(range + 1) - ranges.begin(range));
  });
}

void two_passes(const char* kind, const Shape& shape, int64_t bytes, int64_t tensors,
                int64_t threads) {
  const bool nontemporal = is_nontemporal(shape, bytes, tensors + 1);
  const int64_t block = cache_block_channels(shape, bytes * tensors, nontemporal, threads);
  if (block == 0) return by_chunk(kind, shape, threads);
  const int64_t blocks = ceil_div(shape.C, block);
  divided(kind, blocks, max(1, kGrain / (shape.count() * block)), threads, [&](int64_t i) {
    return static_cast<double>(min((i + 1) * block, shape.C) - i * block) *
           static_cast<double>(shape.count());
  });
}

void one_pass(const Shape& shape, int64_t threads) {
  const int64_t unit = sample_unit(shape), units = ceil_div(shape.N, unit);
  if (units < kTasksPerThread * threads) return by_chunk("inference", shape, threads);
  divided("inference", units, max(1, kGrain / (shape.C * shape.S * unit)), threads, [&](int64_t i) {
    return static_cast<double>(min((i + 1) * unit, shape.N) - i * unit) *
           static_cast<double>(shape.C * shape.S);
  });
}

}  // namespace

int main() {
  long N, C, S, last, bytes;
  while (std::scanf("%ld %ld %ld %ld %ld", &N, &C, &S, &last, &bytes) == 5) {
    const Shape given{N, C, S, last != 0 ? Layout::ChannelsLast : Layout::ChannelsFirst};
    const Shape shape = as_channels_first(given);
    std::printf("# %ld %ld %ld %ld %ld\n", N, C, S, last, bytes);
    for (int64_t threads = 1; threads <= 64; ++threads) {
      two_passes("forward", shape, bytes, 1, threads);
      two_passes("backward", shape, bytes, 2, threads);
      one_pass(shape, threads);
    }
  }
}
