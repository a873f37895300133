// In place of ATen's: one thread after another, so that what each of them gets can be counted.
#pragma once

#include <algorithm>
#include <cstdint>

#define INTRA_OP_PARALLEL

namespace at {

inline int64_t threads = 1;  // as if there were so many
inline int64_t thread = 0;   // the one that runs

inline int64_t get_num_threads() {
  return threads;
}

inline bool in_parallel_region() {
  return false;
}

namespace internal {

// As many threads as there are grains, each with an equal number of items, rounded up.
template <typename F>
void invoke_parallel(int64_t begin, int64_t end, int64_t grain, const F& f) {
  const int64_t items = end - begin;
  const int64_t used = std::min(threads, (items + grain - 1) / grain);
  const int64_t each = (items + used - 1) / used;
  for (thread = 0; thread * each < items; ++thread) {
    f(begin + thread * each, std::min(end, begin + (thread + 1) * each));
  }
  thread = 0;
}

}  // namespace internal
}  // namespace at
