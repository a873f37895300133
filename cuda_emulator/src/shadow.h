// Finds races: remembers who accessed which bytes last.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <unordered_map>
#include <vector>

#include "clocks.h"

namespace emulator {
namespace detail {

enum class Access : unsigned char {
  kNone,
  kRead,
  kWrite,
  kAtomic,
  kCopy,      // an asynchronous copy that was waited for
  kInFlight,  // an asynchronous copy that was not waited for
};

// The state of 4 bytes, or of single bytes once an access of fewer than 4 was seen. The contents of
// another generation (launch, or for shared memory block) count as empty.
struct Cell {
  std::uint32_t generation = 0;
  std::uint32_t readers = 0;  // index + 1 of a list, where readers do not form a chain
  std::uint32_t split = 0;    // index + 1 of a group of 4 cells for the single bytes
  Access wrote = Access::kNone;
  Epoch write;
  Epoch read;
  std::uint64_t fence = 0;  // of an atomic: the clock of the fence before it
};

struct Conflict {
  Access earlier = Access::kNone;  // kNone if there is no conflict
  Access now = Access::kNone;
  Epoch other;
  std::ptrdiff_t byte = 0;  // offset of the first byte in conflict, from the access's first
  bool unwritten = false;   // a read of bytes that nobody wrote in this generation
};

class Shadow {
 public:
  // For shared memory: `bytes` from the cell of offset 0 on.
  void resize(std::size_t bytes) { flat_.resize((bytes + 3) / 4); }

  // Call before a generation begins, when none of the earlier ones is needed any more.
  void forget();
  // The same, and frees the memory.
  void clear();

  // Records the access of `bytes` bytes from `at` on; returns the first conflict with an earlier
  // one. `fence`: of an atomic, the clock of the fence before it, or 0.
  Conflict access(std::uint64_t at, std::size_t bytes, Access kind, const Epoch& now,
                  const Thread& thread, std::uint32_t generation, std::uint64_t fence);

 private:
  struct Readers {
    std::vector<Epoch> list;
    std::uint64_t max_clock = 0;
    bool one_block = true;
  };

  Cell& cell(std::uint64_t index);
  void access_cell(Cell& cell, Access kind, const Epoch& now, const Thread& thread,
                   std::uint64_t fence, Conflict& conflict);
  void add_reader(Cell& cell, const Epoch& now, const Thread& thread);
  const Epoch* unordered_reader(Cell& cell, const Thread& thread);
  void split(Cell& cell);
  std::uint32_t new_readers();

  static constexpr std::uint64_t kPageCells = 1024;
  std::vector<Cell> flat_;
  std::unordered_map<std::uint64_t, std::unique_ptr<std::array<Cell, kPageCells>>> pages_;
  std::uint64_t last_page_number_ = ~std::uint64_t{0};
  std::array<Cell, kPageCells>* last_page_ = nullptr;
  std::vector<Readers> readers_;  // kept from generation to generation, for their capacity
  std::uint32_t used_readers_ = 0;
  std::vector<std::array<Cell, 4>> splits_;
};

}  // namespace detail
}  // namespace emulator
