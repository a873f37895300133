// Registered memory: guard zones, poison, and which bytes were written.
#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>

#include "memory.h"
#include "settings.h"

#ifdef EMULATOR_ASAN
#include <sanitizer/asan_interface.h>
#endif

namespace emulator {
namespace detail {
namespace {

constexpr std::size_t kGuardBytes = 512;

std::vector<std::unique_ptr<Region>>& regions() {  // sorted by address
  static std::vector<std::unique_ptr<Region>> all;
  return all;
}
Region* last_found = nullptr;

struct Symbol {
  void* pointer;
  std::size_t bytes;
};
std::vector<Symbol>& symbols() {
  static std::vector<Symbol> all;
  return all;
}

// The guards are poisoned for the address sanitizer too: plain accesses to them end the program.
void close_guard(const void* at, std::size_t bytes) {
#ifdef EMULATOR_ASAN
  __asan_poison_memory_region(at, bytes);
#else
  static_cast<void>(at);
  static_cast<void>(bytes);
#endif
}
void open_guard(const void* at, std::size_t bytes) {
#ifdef EMULATOR_ASAN
  __asan_unpoison_memory_region(at, bytes);
#else
  static_cast<void>(at);
  static_cast<void>(bytes);
#endif
}

Region& add_region(const std::string& name, void* pointer, std::size_t bytes, Role role) {
  auto region = std::make_unique<Region>();
  region->name = name;
  region->begin = reinterpret_cast<std::uintptr_t>(pointer);
  region->bytes = bytes;
  region->role = role;
  if (role == Role::kOutput) region->writers.assign(bytes, 0);
  Region& added = *region;
  auto& all = regions();
  all.insert(std::upper_bound(all.begin(), all.end(), region,
                              [](const auto& a, const auto& b) { return a->begin < b->begin; }),
             std::move(region));
  last_found = nullptr;
  return added;
}

// The first changed byte of a guard zone, or -1.
std::ptrdiff_t changed_byte(const unsigned char* guard, std::size_t bytes) {
  unsigned char expected[kGuardBytes];
  poison(expected, bytes);
  for (std::size_t i = 0; i < bytes; ++i) {
    if (guard[i] != expected[i]) return static_cast<std::ptrdiff_t>(i);
  }
  return -1;
}

void check_guard(const Region& region, unsigned char* guard, bool after) {
  open_guard(guard, kGuardBytes);
  const std::ptrdiff_t byte = changed_byte(guard, kGuardBytes);
  if (byte >= 0) {
    const std::string distance =
        after ? std::to_string(byte) + " bytes after the end"
              : std::to_string(static_cast<std::ptrdiff_t>(kGuardBytes) - byte) +
                    " bytes before the start";
    report("guard", "a plain store changed memory " + distance + " of '" + region.name + "'");
    poison(guard, kGuardBytes);
  }
  close_guard(guard, kGuardBytes);
}

}  // namespace

bool any_region() {
  return !regions().empty();
}

Region* find_region(std::uintptr_t at) {
  if (last_found != nullptr && at - last_found->begin < last_found->bytes) return last_found;
  const auto& all = regions();
  auto after = std::upper_bound(all.begin(), all.end(), at,
                                [](std::uintptr_t a, const auto& r) { return a < r->begin; });
  if (after == all.begin()) return nullptr;
  Region* region = std::prev(after)->get();
  if (at - region->begin >= region->bytes) return nullptr;
  return last_found = region;
}

std::string nearest_text(std::uintptr_t at) {
  std::string text = "address " + hex(at);
  std::uintptr_t least = 1 << 20;
  for (const auto& region : regions()) {
    const std::uintptr_t end = region->begin + region->bytes;
    if (at >= end && at - end < least) {
      least = at - end;
      text =
          (least == 0 ? "an address directly" : "an address " + std::to_string(least) + " bytes") +
          " after the end of '" + region->name + "'";
    } else if (at < region->begin && region->begin - at < least) {
      least = region->begin - at;
      text = "an address " + std::to_string(least) + " bytes before the start of '" + region->name +
             "'";
    }
  }
  return text;
}

void check_guards() {
  for (const auto& region : regions()) {
    if (region->allocation == nullptr) continue;
    auto* data = reinterpret_cast<unsigned char*>(region->begin);
    check_guard(*region, data - kGuardBytes, false);
    check_guard(*region, data + region->bytes, true);
  }
}

void forget_regions() {
  for (const auto& region : regions()) {
    if (region->allocation == nullptr) continue;
    auto* data = reinterpret_cast<unsigned char*>(region->begin);
    open_guard(data - kGuardBytes, region->bytes + 2 * kGuardBytes);
    std::free(region->allocation);
  }
  regions().clear();
  last_found = nullptr;
  forget_global_shadow();
}

cudaError_t symbol_address(void** pointer, const void* symbol, std::size_t bytes) {
  *pointer = nullptr;
  if (!settings().device->has_code) return cudaErrorNoKernelImageForDevice;
  *pointer = const_cast<void*>(symbol);
  const auto is_known = [&](const Symbol& s) { return s.pointer == symbol; };
  if (std::any_of(symbols().begin(), symbols().end(), is_known)) return cudaSuccess;
  symbols().push_back({*pointer, bytes});
  add_region("__device__ variable", *pointer, bytes, Role::kWorkspace);
  return cudaSuccess;
}

// As when the code is loaded.
void register_symbols() {
  for (const Symbol& s : symbols()) {
    std::memset(s.pointer, 0, s.bytes);
    add_region("__device__ variable", s.pointer, s.bytes, Role::kWorkspace);
  }
}

void forget_symbols() {
  symbols().clear();
}

}  // namespace detail

void register_region(const std::string& name, void* pointer, std::size_t bytes, Role role) {
  detail::add_region(name, pointer, bytes, role);
}

void* allocate_bytes(const std::string& name, std::size_t bytes, Role role,
                     std::size_t misalignment) {
  constexpr std::size_t kAlignment = 256;
  void* allocation = std::malloc(bytes + misalignment + 2 * detail::kGuardBytes + kAlignment);
  if (allocation == nullptr) std::abort();
  auto at = reinterpret_cast<std::uintptr_t>(allocation) + detail::kGuardBytes;
  at = (at + kAlignment - 1) / kAlignment * kAlignment + misalignment;
  auto* data = reinterpret_cast<unsigned char*>(at);
  detail::poison(data - detail::kGuardBytes, detail::kGuardBytes);
  detail::poison(data + bytes, detail::kGuardBytes);
  detail::close_guard(data - detail::kGuardBytes, detail::kGuardBytes);
  detail::close_guard(data + bytes, detail::kGuardBytes);
  if (role == Role::kInput) {
    std::memset(data, 0, bytes);
  } else {
    detail::poison(data, bytes);
  }
  detail::add_region(name, data, bytes, role).allocation = allocation;
  return data;
}

void check_outputs(std::size_t element_bytes) {
  detail::check_guards();
  for (const auto& region : detail::regions()) {
    const auto* data = reinterpret_cast<const unsigned char*>(region->begin);
    std::size_t first = region->bytes;
    std::size_t missing = 0;
    if (region->role == Role::kOutput) {
      for (std::size_t i = 0; i < region->bytes; ++i) {
        if (region->writers[i] != 0) continue;
        if (missing == 0) first = i;
        ++missing;
      }
    } else if (region->role == Role::kPlainOutput && region->allocation != nullptr) {
      const std::size_t step = element_bytes;
      std::vector<unsigned char> untouched(step);
      detail::poison(untouched.data(), step);
      for (std::size_t i = 0; i + step <= region->bytes; i += step) {
        if (std::memcmp(data + i, untouched.data(), step) != 0) continue;
        if (missing == 0) first = i;
        missing += step;
      }
    }
    if (missing == 0) continue;
    detail::report("unwritten", std::to_string(missing) + " bytes of '" + region->name +
                                    "' were never written, the first at +" + std::to_string(first));
  }
}

}  // namespace emulator
