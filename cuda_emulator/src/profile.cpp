#include "profile.h"

#include <algorithm>
#include <array>
#include <map>
#include <set>
#include <tuple>
#include <utility>

#include "settings.h"

namespace emulator {
namespace detail {
namespace {

constexpr int kLanes = 32;
constexpr int kBanks = 32;
constexpr std::size_t kBankBytes = 4;

std::vector<Profile>& all() {
  static std::vector<Profile> profiles;
  return profiles;
}

// One access of a warp: by the lanes that make it from the same place in the code for the same
// time since their last meeting or barrier, all of them to memory of one block.
struct WarpAccess {
  std::size_t bytes = 0;
  std::array<std::ptrdiff_t, kLanes> offset;  // -1: the lane takes no part

  WarpAccess() { offset.fill(-1); }
};
// Block, its phase, thread or warp, meetings of the warp, place in the code, owner of the memory,
// bytes.
using Site = std::tuple<std::uint64_t, std::uint64_t, int, std::uint64_t, const void*,
                        std::uint64_t, std::size_t>;
std::map<Site, int> times;                            // that a thread was there
std::map<std::pair<Site, int>, WarpAccess> accesses;  // of a warp, by time

// How many lanes are served at once.
int lanes_of(std::size_t bytes) {
  return bytes == 16 ? 8 : bytes == 8 ? 16 : kLanes;
}

int ways(const WarpAccess& access) {
  int worst = 1;
  const int together = lanes_of(access.bytes);
  for (int first = 0; first < kLanes; first += together) {
    std::set<std::size_t> words[kBanks];
    for (int lane = first; lane < first + together; ++lane) {
      if (access.offset[lane] < 0) continue;
      const std::size_t begin = static_cast<std::size_t>(access.offset[lane]) / kBankBytes;
      const std::size_t count = (access.bytes + kBankBytes - 1) / kBankBytes;
      for (std::size_t word = begin; word < begin + count; ++word) {
        words[word % kBanks].insert(word);
        worst = std::max(worst, static_cast<int>(words[word % kBanks].size()));
      }
    }
  }
  return worst;
}

int log2_of(std::size_t bytes) {
  int log = 0;
  while (std::size_t{1} << log < bytes) ++log;
  return log;
}

}  // namespace

void begin_profile(const std::string& kernel) {
  if (!settings().profiled) return;
  accesses.clear();
  times.clear();
  all().push_back({kernel, 0, 0, {0, 0, 0, 0, 0}});
}

void end_profile() {
  if (!settings().profiled) return;
  for (const auto& [place, access] : accesses) {
    int& worst = all().back().ways[log2_of(access.bytes)];
    worst = std::max(worst, ways(access));
  }
  accesses.clear();
  times.clear();
}

void forget_profiles() {
  all().clear();
}

void profile_shared(const Block* owner, std::ptrdiff_t offset, std::size_t bytes,
                    const void* from) {
  if (!settings().profiled || owner == nullptr || offset < 0 || bytes > 16) return;
  const Block& block = *current->block;
  Site place{block.number, block.phase,   current->index, current->warp->meetings,
             from,         owner->number, bytes};
  const int time = times[place]++;
  std::get<2>(place) = current->index / kLanes;
  WarpAccess& access = accesses[{place, time}];
  access.bytes = bytes;
  access.offset[static_cast<std::size_t>(current->index % kLanes)] = offset;
}

void profile_store() {
  if (settings().profiled) ++all().back().stores;
}
void profile_evict_first() {
  if (settings().profiled) ++all().back().evict_first;
}

}  // namespace detail

const std::vector<Profile>& profiles() {
  return detail::all();
}

}  // namespace emulator
