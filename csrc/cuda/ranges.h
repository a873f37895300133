// Which words of an array are free. Plain C++, without locks.
#pragma once

#include <cstdint>
#include <iterator>
#include <map>

namespace bnorm_ext {
namespace cuda {

struct Range {
  int64_t begin = 0, count = 0;
};

class FreeRanges {
 public:
  explicit FreeRanges(int64_t count) : count_at_{{0, count}} {}

  // Takes `count` words, the first that are free; none where there are not so many in a row.
  Range take(int64_t count) {
    for (auto it = count_at_.begin(); it != count_at_.end(); ++it) {
      const Range free = {it->first, it->second};
      if (free.count < count) continue;
      count_at_.erase(it);
      if (free.count > count) count_at_[free.begin + count] = free.count - count;
      return {free.begin, count};
    }
    return {};
  }

  void give_back(Range range) {
    auto after = count_at_.lower_bound(range.begin);
    if (after != count_at_.end() && after->first == range.begin + range.count) {
      range.count += after->second;
      after = count_at_.erase(after);
    }
    if (after != count_at_.begin()) {
      const auto before = std::prev(after);
      if (before->first + before->second == range.begin) {
        before->second += range.count;
        return;
      }
    }
    count_at_[range.begin] = range.count;
  }

 private:
  std::map<int64_t, int64_t> count_at_;  // by the first word; no two of them touch
};

}  // namespace cuda
}  // namespace bnorm_ext
