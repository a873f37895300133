// Checks of accesses: bounds, alignment, roles, races. All for the current thread.
#pragma once

#include <cstdint>
#include <string>

#include "machine.h"

namespace emulator {
namespace detail {

// Memory that the harness registered.
struct Region {
  std::string name;
  std::uintptr_t begin = 0;
  std::size_t bytes = 0;
  Role role = Role::kWorkspace;
  void* allocation = nullptr;          // null for memory of the caller, without guard zones
  std::vector<std::uint64_t> writers;  // of kOutput: the key of each byte's thread; 0: nobody
};
// The region that contains the first byte, or null.
Region* find_region(std::uintptr_t at);
bool any_region();
std::string nearest_text(std::uintptr_t at);  // for an address outside: "12 bytes after ..."

// "shared memory +12", "'partials' +8", ...
std::string place_text(const Block* owner, std::uintptr_t at);

// False if the access was reported and must not be made.
bool check_shared(Block* owner, std::ptrdiff_t offset, std::size_t bytes, Access kind);
bool check_global(std::uintptr_t at, std::size_t bytes, Access kind);

// Reports races. A null owner means global memory. `fence` as in Shadow::access.
void record(Block* owner, std::uintptr_t at, std::size_t bytes, Access kind, const Epoch& now,
            std::uint64_t fence = 0);

const char* verb(Access kind);
void forget_global_shadow();

}  // namespace detail
}  // namespace emulator
