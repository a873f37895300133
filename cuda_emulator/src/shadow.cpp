#include "shadow.h"

#include <algorithm>

#include "machine.h"

namespace emulator {
namespace detail {

Cell& Shadow::cell(std::uint64_t index) {
  if (!flat_.empty()) return flat_[index];
  const std::uint64_t number = index / kPageCells;
  if (number != last_page_number_) {
    auto& page = pages_[number];
    if (page == nullptr) page = std::make_unique<std::array<Cell, kPageCells>>();
    last_page_number_ = number;
    last_page_ = page.get();
  }
  return (*last_page_)[index % kPageCells];
}

void Shadow::forget() {
  used_readers_ = 0;
  splits_.clear();
}

void Shadow::clear() {
  forget();
  pages_.clear();
  last_page_number_ = ~std::uint64_t{0};
}

std::uint32_t Shadow::new_readers() {
  if (used_readers_ == readers_.size()) readers_.emplace_back();
  readers_[used_readers_].list.clear();
  return ++used_readers_;
}

Conflict Shadow::access(std::uint64_t at, std::size_t bytes, Access kind, const Epoch& now,
                        const Thread& thread, std::uint32_t generation, std::uint64_t fence) {
  Conflict conflict;
  conflict.now = kind;
  const std::uint64_t end = at + bytes;
  for (std::uint64_t granule = at / 4; granule * 4 < end; ++granule) {
    const std::uint64_t from = std::max(at, granule * 4);
    const std::uint64_t to = std::min(end, granule * 4 + 4);
    Cell& c = cell(granule);
    if (c.generation != generation) {
      c = Cell{};
      c.generation = generation;
    }
    const bool before = conflict.earlier != Access::kNone || conflict.unwritten;
    if (c.split == 0 && to - from == 4) {
      access_cell(c, kind, now, thread, fence, conflict);
    } else {
      if (c.split == 0) split(c);
      const std::uint32_t group = c.split - 1;
      for (std::uint64_t byte = from; byte < to; ++byte) {
        access_cell(splits_[group][byte % 4], kind, now, thread, fence, conflict);
      }
    }
    if (!before && (conflict.earlier != Access::kNone || conflict.unwritten)) {
      conflict.byte = static_cast<std::ptrdiff_t>(from - at);
    }
  }
  return conflict;
}

void Shadow::split(Cell& cell) {
  std::array<Cell, 4> group;
  for (Cell& byte : group) {
    byte = cell;
    byte.split = 0;
    byte.readers = 0;
    if (cell.readers != 0 && !readers_[cell.readers - 1].list.empty()) {
      byte.readers = new_readers();
      readers_[byte.readers - 1] = readers_[cell.readers - 1];
    }
  }
  splits_.push_back(group);
  cell.split = static_cast<std::uint32_t>(splits_.size());
}

// For other blocks an atomic counts as done at the fence before it. A block that saw its value, and
// with it what came before the fence, may access its address by other means: for example the block
// that resets a semaphore.
static bool written_before(const Cell& cell, const Thread& thread) {
  if (happened_before(cell.write, thread)) return true;
  return cell.fence != 0 && block_of(cell.write.key) != thread.block->number &&
         happened_before(Epoch{cell.write.key, cell.fence}, thread);
}

void Shadow::access_cell(Cell& cell, Access kind, const Epoch& now, const Thread& thread,
                         std::uint64_t fence, Conflict& conflict) {
  const auto report = [&](Access earlier, const Epoch& other) {
    if (conflict.earlier == Access::kNone) {
      conflict.earlier = earlier;
      conflict.other = other;
    }
  };
  const bool both_atomic = kind == Access::kAtomic && cell.wrote == Access::kAtomic;
  if (cell.wrote == Access::kInFlight) {
    // A conflict even for the thread that started the copy. kCopy is its end, made by the runtime.
    if (kind != Access::kCopy) report(Access::kInFlight, cell.write);
  } else if (cell.wrote != Access::kNone && !both_atomic && !written_before(cell, thread)) {
    report(cell.wrote, cell.write);
  }
  if (kind == Access::kRead) {
    if (cell.wrote == Access::kNone && conflict.earlier == Access::kNone) {
      conflict.unwritten = true;
    }
    add_reader(cell, now, thread);
    return;
  }
  if (kind != Access::kCopy) {
    const Epoch* reader = unordered_reader(cell, thread);
    if (reader != nullptr) report(Access::kRead, *reader);
  }
  cell.wrote = kind;
  cell.write = now;
  cell.fence = fence;
  cell.read = Epoch{};
  if (cell.readers != 0) readers_[cell.readers - 1].list.clear();
}

const Epoch* Shadow::unordered_reader(Cell& cell, const Thread& thread) {
  if (cell.readers != 0 && !readers_[cell.readers - 1].list.empty()) {
    const Readers& readers = readers_[cell.readers - 1];
    const bool earlier_phase = readers.one_block &&
                               block_of(readers.list[0].key) == thread.block->number &&
                               readers.max_clock < thread.block->phase << 32;
    if (earlier_phase) return nullptr;
    for (const Epoch& reader : readers.list) {
      if (!happened_before(reader, thread)) return &reader;
    }
    return nullptr;
  }
  if (cell.read.clock != 0 && !happened_before(cell.read, thread)) return &cell.read;
  return nullptr;
}

void Shadow::add_reader(Cell& cell, const Epoch& now, const Thread& thread) {
  const bool listed = cell.readers != 0 && !readers_[cell.readers - 1].list.empty();
  if (!listed) {
    // A reader that happened before the new one need not be remembered.
    if (cell.read.clock == 0 || happened_before(cell.read, thread)) {
      cell.read = now;
      return;
    }
    if (cell.readers == 0) cell.readers = new_readers();
    Readers& readers = readers_[cell.readers - 1];
    readers.list = {cell.read};
    readers.max_clock = cell.read.clock;
    readers.one_block = true;
  }
  Readers& readers = readers_[cell.readers - 1];
  if (readers.list.back().key == now.key) {
    readers.list.back() = now;
  } else if (readers.one_block && block_of(readers.list[0].key) == thread.block->number &&
             readers.max_clock < thread.block->phase << 32) {
    readers.list = {now};
    readers.max_clock = 0;
  } else {
    if (block_of(readers.list[0].key) != thread.block->number) readers.one_block = false;
    readers.list.push_back(now);
    // Keeps the last access of each thread, once the list may hold every thread twice.
    if (readers.list.size() >= 4096) {
      std::stable_sort(readers.list.begin(), readers.list.end(),
                       [](const Epoch& a, const Epoch& b) { return a.key < b.key; });
      std::vector<Epoch> last;
      for (const Epoch& e : readers.list) {
        if (!last.empty() && last.back().key == e.key) {
          last.back() = e;
        } else {
          last.push_back(e);
        }
      }
      readers.list.swap(last);
    }
  }
  readers.max_clock = std::max(readers.max_clock, now.clock);
}

}  // namespace detail
}  // namespace emulator
