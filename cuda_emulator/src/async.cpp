// Asynchronous copies. A copy is made as late as possible, when its thread waits for it. Until then
// its destination is poisoned.
#include <cstring>

#include "memory.h"

namespace emulator {
namespace detail {

void async_copy(Block* owner, std::ptrdiff_t offset, const void* from) {
  constexpr std::size_t kBytes = 16;
  maybe_yield();
  Thread& self = *current;
  const auto source = reinterpret_cast<std::uintptr_t>(from);
  if (offset % static_cast<std::ptrdiff_t>(kBytes) != 0 || source % kBytes != 0) {
    const bool to = offset % static_cast<std::ptrdiff_t>(kBytes) != 0;
    report("misaligned", std::string("starts an asynchronous copy ") +
                             (to ? "to " + place_text(owner, static_cast<std::uintptr_t>(offset))
                                 : "from " + place_text(nullptr, source)) +
                             ", which is not a multiple of 16");
    return;
  }
  if (!check_shared(owner, offset, kBytes, Access::kInFlight) ||
      !check_global(source, kBytes, Access::kRead)) {
    return;
  }
  record(owner, static_cast<std::uintptr_t>(offset), kBytes, Access::kInFlight,
         Epoch{self.key, self.clock});
  poison(owner->shared + offset, kBytes);
  Extra& extra = self.more();
  extra.copies.push_back({owner, offset, from, extra.groups});
}

void async_commit() {
  ++current->more().groups;
}

void async_wait(int pending_groups) {
  Thread& self = *current;
  Extra& extra = self.more();
  maybe_yield();
  // Groups with lower numbers are complete. Copies that are not committed have the highest number.
  const std::uint64_t pending = static_cast<std::uint64_t>(pending_groups);
  const std::uint64_t done = extra.groups > pending ? extra.groups - pending : 0;
  std::size_t kept = 0;
  for (AsyncCopy& copy : extra.copies) {
    if (copy.group >= done) {
      extra.copies[kept++] = copy;
      continue;
    }
    std::memcpy(copy.block->shared + copy.offset, copy.from, 16);
    record(copy.block, static_cast<std::uintptr_t>(copy.offset), 16, Access::kCopy,
           Epoch{self.key, self.clock});
  }
  extra.copies.resize(kept);
  moved_on();
}

}  // namespace detail
}  // namespace emulator
