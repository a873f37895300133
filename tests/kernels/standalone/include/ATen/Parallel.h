// In place of torch's header of this name: plain threads, which ThreadSanitizer follows.
#pragma once

#include <algorithm>
#include <cstdint>
#include <thread>
#include <vector>

#define INTRA_OP_PARALLEL

namespace at {

inline int number_of_threads = 1;

inline int get_num_threads() {
  return number_of_threads;
}

inline bool in_parallel_region() {
  return false;
}

namespace internal {

// As torch divides: as many threads as there are grains, each with an equal share.
template <typename F>
void invoke_parallel(int64_t begin, int64_t end, int64_t grain, const F& f) {
  const int64_t grains = (end - begin + grain - 1) / std::max<int64_t>(grain, 1);
  const int64_t used = std::min<int64_t>(number_of_threads, grains);
  const int64_t each = (end - begin + used - 1) / used;
  std::vector<std::thread> threads;
  for (int64_t first = begin; first < end; first += each) {
    threads.emplace_back([=, &f] { f(first, std::min(first + each, end)); });
  }
  for (std::thread& thread : threads) thread.join();
}

}  // namespace internal
}  // namespace at
