#include "memory.h"

#include <cstring>

#include "profile.h"
#include "settings.h"

namespace emulator {
namespace detail {
namespace {

// Of all global memory, by address.
Shadow& global_shadow() {
  static Shadow shadow;
  return shadow;
}

Epoch now() {
  return {current->key, current->clock};
}

std::string bytes_text(std::size_t bytes) {
  return std::to_string(bytes) + (bytes == 1 ? " byte" : " bytes");
}

bool aligned(std::uintptr_t at, std::size_t bytes) {
  const bool power = (bytes & (bytes - 1)) == 0;
  return !power || at % bytes == 0;
}

// Races of one launch are similar: only the first few are reported.
constexpr int kRacesPerLaunch = 4;

const char* past(Access kind) {
  switch (kind) {
    case Access::kRead:
      return "read";
    case Access::kAtomic:
      return "changed by an atomic";
    case Access::kCopy:
      return "filled by an asynchronous copy";
    default:
      return "wrote";
  }
}

void report_conflict(const Conflict& c, const Block* owner, std::uintptr_t at, std::size_t bytes) {
  const std::string where =
      bytes_text(bytes) + " at " + place_text(owner, at + static_cast<std::uintptr_t>(c.byte));
  if (c.earlier == Access::kInFlight) {
    if (running->in_flight++ >= kRacesPerLaunch) return;
    report("async", std::string(verb(c.now)) + " " + where + ", which an asynchronous copy of " +
                        describe(c.other) + " still fills: nobody waited for it");
    return;
  }
  if (c.earlier == Access::kNone) {
    if (running->unwritten++ >= kRacesPerLaunch) return;
    report("uninitialised", std::string(verb(c.now)) + " " + where + ", which nobody wrote yet");
    return;
  }
  if (running->races++ >= kRacesPerLaunch) return;
  report("race", std::string(verb(c.now)) + " " + where + ", which " + describe(c.other) + " " +
                     past(c.earlier) + "; nothing orders the two");
}

}  // namespace

const char* verb(Access kind) {
  switch (kind) {
    case Access::kRead:
      return "reads";
    case Access::kAtomic:
      return "makes an atomic access to";
    case Access::kInFlight:
    case Access::kCopy:
      return "starts an asynchronous copy to";
    default:
      return "writes";
  }
}

void forget_global_shadow() {
  global_shadow().clear();
}
void start_memory() {
  global_shadow().forget();
}

void poison(unsigned char* memory, std::size_t bytes) {
  // A NaN in every floating-point format.
  const unsigned char pattern[2] = {0xf5, 0x7f};
  for (std::size_t i = 0; i < bytes; ++i) memory[i] = pattern[i % 2];
}

std::string place_text(const Block* owner, std::uintptr_t at) {
  if (owner != nullptr) {
    std::string text = "shared memory ";
    if (owner != current->block) {
      text += "of block (" + std::to_string(owner->at.x) + "," + std::to_string(owner->at.y) + "," +
              std::to_string(owner->at.z) + ") ";
    }
    const auto offset = static_cast<std::ptrdiff_t>(at);
    return text + (offset < 0 ? "" : "+") + std::to_string(offset);
  }
  if (const Region* region = find_region(at)) {
    return "'" + region->name + "' +" + std::to_string(at - region->begin);
  }
  return "address " + hex(at);
}

void record(Block* owner, std::uintptr_t at, std::size_t bytes, Access kind, const Epoch& epoch,
            std::uint64_t fence) {
  Shadow& shadow = owner != nullptr ? owner->shadow : global_shadow();
  const std::uint32_t generation = owner != nullptr ? owner->generation : running->generation;
  const Conflict c = shadow.access(at, bytes, kind, epoch, *current, generation, fence);
  if (c.earlier != Access::kNone || (c.unwritten && owner != nullptr)) {
    report_conflict(c, owner, at, bytes);
  }
}

bool check_shared(Block* owner, std::ptrdiff_t offset, std::size_t bytes, Access kind) {
  const auto size = static_cast<std::ptrdiff_t>(running->shared_bytes);
  if (owner == nullptr || offset < 0 || offset + static_cast<std::ptrdiff_t>(bytes) > size) {
    report("outside",
           std::string(verb(kind)) + " " + bytes_text(bytes) + " at " +
               (owner == nullptr ? "shared memory through a null pointer"
                                 : place_text(owner, static_cast<std::uintptr_t>(offset))) +
               ", but the launch has " + std::to_string(size) + " bytes of it");
    return false;
  }
  if (owner == current->block) return true;
  if (owner->live == 0) {
    report("cluster", std::string(verb(kind)) + " " + bytes_text(bytes) + " at " +
                          place_text(owner, static_cast<std::uintptr_t>(offset)) +
                          ", which has exited");
    return false;
  }
  owner->remote[current->key] = current->clock;
  return true;
}

bool check_global(std::uintptr_t at, std::size_t bytes, Access kind) {
  if (!any_region()) {
    if (at != 0) return true;
    report("outside", std::string(verb(kind)) + " " + bytes_text(bytes) + " at a null pointer");
    return false;
  }
  const Region* region = find_region(at);
  const bool inside = region != nullptr && at + bytes <= region->begin + region->bytes;
  if (!inside) {
    report("outside", std::string(verb(kind)) + " " + bytes_text(bytes) + " at " +
                          (region != nullptr ? place_text(nullptr, at) : nearest_text(at)) +
                          ", outside of all registered memory");
    return false;
  }
  if (region->role == Role::kInput && kind != Access::kRead) {
    report("outside", std::string(verb(kind)) + " " + bytes_text(bytes) + " at " +
                          place_text(nullptr, at) + ", which is an input");
    return false;
  }
  return true;
}

void check_shared_offset(std::ptrdiff_t offset, std::size_t alignment) {
  if (offset < 0 || static_cast<std::size_t>(offset) > running->shared_bytes) {
    report("outside", "takes shared memory from byte " + std::to_string(offset) +
                          " on, but the launch has " + std::to_string(running->shared_bytes));
  } else if (static_cast<std::size_t>(offset) % alignment != 0) {
    report("misaligned", "takes shared memory from byte " + std::to_string(offset) +
                             " on for a type that is aligned to " + std::to_string(alignment));
  }
}

void shared_read(Block* owner, std::ptrdiff_t offset, void* to, std::size_t bytes) {
  profile_shared(owner, offset, bytes, __builtin_return_address(0));
  maybe_yield();
  if (!check_shared(owner, offset, bytes, Access::kRead)) {
    poison(static_cast<unsigned char*>(to), bytes);
    return;
  }
  record(owner, static_cast<std::uintptr_t>(offset), bytes, Access::kRead, now());
  std::memcpy(to, owner->shared + offset, bytes);
}

void shared_write(Block* owner, std::ptrdiff_t offset, const void* from, std::size_t bytes) {
  profile_shared(owner, offset, bytes, __builtin_return_address(0));
  maybe_yield();
  if (!check_shared(owner, offset, bytes, Access::kWrite)) return;
  moved_on();
  record(owner, static_cast<std::uintptr_t>(offset), bytes, Access::kWrite, now());
  std::memcpy(owner->shared + offset, from, bytes);
}

static bool check_alignment(std::uintptr_t at, std::size_t alignment, std::size_t bytes,
                            Access kind) {
  if (aligned(at, alignment)) return true;
  report("misaligned", std::string(verb(kind)) + " " + bytes_text(bytes) + " at " +
                           place_text(nullptr, at) + ", which is not a multiple of " +
                           std::to_string(alignment) + " in memory");
  return false;
}

void workspace_read(const void* from, void* to, std::size_t bytes, std::size_t alignment) {
  maybe_yield();
  const auto at = reinterpret_cast<std::uintptr_t>(from);
  if (!check_alignment(at, alignment, bytes, Access::kRead) ||
      !check_global(at, bytes, Access::kRead)) {
    poison(static_cast<unsigned char*>(to), bytes);
    return;
  }
  record(nullptr, at, bytes, Access::kRead, now());
  std::memcpy(to, from, bytes);
}

void workspace_write(void* to, const void* from, std::size_t bytes, std::size_t alignment) {
  maybe_yield();
  const auto at = reinterpret_cast<std::uintptr_t>(to);
  if (!check_alignment(at, alignment, bytes, Access::kWrite) ||
      !check_global(at, bytes, Access::kWrite)) {
    return;
  }
  moved_on();
  record(nullptr, at, bytes, Access::kWrite, now());
  std::memcpy(to, from, bytes);
}

void tensor_read(const void* from, void* to, std::size_t bytes) {
  maybe_yield();
  const auto at = reinterpret_cast<std::uintptr_t>(from);
  if (!check_alignment(at, bytes, bytes, Access::kRead) ||
      !check_global(at, bytes, Access::kRead)) {
    poison(static_cast<unsigned char*>(to), bytes);
    return;
  }
  moved_on();
  // Inputs are never written, and memory that is not registered is not checked.
  const Region* region = find_region(at);
  if (region != nullptr && region->role != Role::kInput && region->role != Role::kOutput) {
    record(nullptr, at, bytes, Access::kRead, now());
  }
  std::memcpy(to, from, bytes);
}

// A GPU ignores a prefetch from where there is no memory. It would be of no use: a wrong address.
void prefetch(const void* p) {
  check_global(reinterpret_cast<std::uintptr_t>(p), 1, Access::kRead);
}

void tensor_write_evict_first(void* to, const void* from, std::size_t bytes) {
  profile_evict_first();
  tensor_write(to, from, bytes);
}

void tensor_write(void* to, const void* from, std::size_t bytes) {
  profile_store();
  maybe_yield();
  const auto at = reinterpret_cast<std::uintptr_t>(to);
  if (!check_alignment(at, bytes, bytes, Access::kWrite) ||
      !check_global(at, bytes, Access::kWrite)) {
    return;
  }
  moved_on();
  Region* region = find_region(at);
  if (region != nullptr && region->role == Role::kOutput) {
    const std::size_t first = at - region->begin;
    for (std::size_t i = first; i < first + bytes; ++i) {
      if (region->writers[i] != 0) {
        report("twice", "writes " + bytes_text(bytes) + " at " + place_text(nullptr, at) +
                            ", which " + describe(Epoch{region->writers[i], 0}) + " wrote already");
        break;
      }
    }
    for (std::size_t i = first; i < first + bytes; ++i) region->writers[i] = current->key;
  } else if (region != nullptr) {
    record(nullptr, at, bytes, Access::kWrite, now());
  }
  std::memcpy(to, from, bytes);
}

void exit_shared(Thread& thread) {
  Block& block = *thread.block;
  if (block.remote.empty()) return;
  for (auto it = block.remote.begin(); it != block.remote.end();) {
    const bool known = happened_before(Epoch{it->first, it->second}, thread);
    it = known ? block.remote.erase(it) : std::next(it);
  }
  if (block.live > 1 || block.remote.empty()) return;
  const Epoch access{block.remote.begin()->first, block.remote.begin()->second};
  report("cluster", "exits, the last of its block, and nothing orders that after " +
                        describe(access) + " accessing the shared memory of this block");
}

}  // namespace detail
}  // namespace emulator
