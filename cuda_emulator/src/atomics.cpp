// Atomics and fences, and the order that they establish together.
//
// A fence of thread A, an atomic of A on F, an atomic of B on F that sees it (directly or through a
// chain of atomics on F), a fence of B: after its fence B knows what A knew at its own. An atomic
// alone orders nothing. An acquire load by B does for F what an atomic and a fence would do.
#include <cstring>
#include <unordered_map>

#include "machine.h"
#include "memory.h"

namespace emulator {
namespace detail {
namespace {

// What the atomics on one address have published so far.
struct Flag {
  std::uint32_t generation = 0;  // of the block, for shared memory
  KnownPtr released;
};
std::unordered_map<std::uintptr_t, Flag> flags;

bool own_shared(Place place) {
  return place.owner == current->block;
}

std::uintptr_t address_of(Place place) {
  return place.owner == nullptr ? place.at
                                : reinterpret_cast<std::uintptr_t>(place.owner->shared) + place.at;
}

Flag& flag_of(Place place) {
  Flag& flag = flags[address_of(place)];
  const std::uint32_t generation = place.owner == nullptr ? 0 : place.owner->generation;
  if (flag.generation != generation) flag = Flag{generation, nullptr};
  return flag;
}

}  // namespace

void start_atomics() {
  flags.clear();
}

void* atomic_begin(Place place, std::size_t bytes) {
  yield();
  const auto address = address_of(place);
  if (place.at % bytes != 0) {
    report("misaligned", "makes an atomic access of " + std::to_string(bytes) + " bytes at " +
                             place_text(place.owner, place.at) +
                             ", which is not a multiple of them");
    return nullptr;
  }
  if (place.owner != nullptr) {
    if (!check_shared(place.owner, static_cast<std::ptrdiff_t>(place.at), bytes, Access::kAtomic)) {
      return nullptr;
    }
  } else if (!check_global(place.at, bytes, Access::kAtomic)) {
    return nullptr;
  }
  return reinterpret_cast<void*>(address);
}

void atomic_end(Place place, std::size_t bytes, bool wrote) {
  Thread& self = *current;
  Extra& extra = self.more();
  const bool own = own_shared(place);
  const auto& fence = own ? extra.fence_block : extra.fence;
  record(place.owner, place.at, bytes, Access::kAtomic, Epoch{self.key, self.clock},
         fence != nullptr ? fence->clock : 0);

  Flag& flag = flag_of(place);
  auto& pending = own ? extra.pending_block : extra.pending;
  pending = join(pending, flag.released);
  if (wrote && fence != nullptr) flag.released = join(flag.released, as_known(*fence, self));
  ++self.clock;
  yield();
}

unsigned load_acquire(const unsigned* p) {
  unsigned value = 0;
  const Place place{nullptr, reinterpret_cast<std::uintptr_t>(p)};
  const void* memory = atomic_begin(place, sizeof(value));
  if (memory == nullptr) return value;
  std::memcpy(&value, memory, sizeof(value));
  Thread& self = *current;
  const auto& fence = self.more().fence;
  record(nullptr, place.at, sizeof(value), Access::kAtomic, Epoch{self.key, self.clock},
         fence != nullptr ? fence->clock : 0);
  self.known = join(self.known, flag_of(place).released);
  ++self.clock;
  yield();
  return value;
}

void sleep() {
  yield();
}

void fence(bool whole_device) {
  Thread& self = *current;
  Extra& extra = self.more();
  self.known = join(self.known, extra.pending_block);
  extra.pending_block = nullptr;
  if (whole_device) {
    self.known = join(self.known, extra.pending);
    extra.pending = nullptr;
    if (extra.fence == nullptr) extra.fence = std::make_unique<Snapshot>();
    take_snapshot(*extra.fence, self);
  }
  if (extra.fence_block == nullptr) extra.fence_block = std::make_unique<Snapshot>();
  take_snapshot(*extra.fence_block, self);
  ++self.clock;
  yield();
}

}  // namespace detail
}  // namespace emulator
