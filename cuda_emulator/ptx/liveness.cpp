// Which registers share a slot. nvcc names thousands of registers for each kernel, of which few are
// needed at the same time. With a slot for each, the threads of a launch would not fit into the
// host's caches.
//
// Liveness is computed per basic block, backwards until nothing changes. Then each register has an
// interval of the code, and slots are given to the intervals in the order of their begin.
#include <algorithm>
#include <functional>
#include <queue>

#include "decoder.h"

namespace emulator {
namespace ptx {
namespace {

using Bits = std::vector<std::uint64_t>;  // one per register

bool has(const Bits& bits, std::uint32_t i) {
  return (bits[i / 64] >> i % 64 & 1) != 0;
}
void set(Bits& bits, std::uint32_t i) {
  bits[i / 64] |= std::uint64_t{1} << i % 64;
}

template <typename F>
void for_each(const Bits& bits, F f) {
  for (std::size_t w = 0; w < bits.size(); ++w) {
    for (std::uint64_t rest = bits[w]; rest != 0; rest &= rest - 1) {
      f(static_cast<std::uint32_t>(64 * w) + static_cast<std::uint32_t>(__builtin_ctzll(rest)));
    }
  }
}

struct BasicBlock {
  std::size_t begin, end;  // instructions
  Bits read, written;      // before anything is written here; certainly written
  Bits live_in, live_out;
  std::vector<std::size_t> next;  // blocks
};

class Liveness {
 public:
  Liveness(const Kernel& kernel, std::uint32_t registers)
      : code_(kernel.code), registers_(registers) {
    find_blocks();
    for (BasicBlock& block : blocks_) scan(block);
    while (propagate()) {
    }
  }

  // f(register) for each register that the instruction reads, or writes.
  template <typename F>
  void for_reads(const Instruction& i, F f) const {
    for (int k = 0; k < i.operands; ++k) {
      if (i.operand[k] < registers_) f(i.operand[k]);
    }
    if (i.has_base && i.base < registers_) f(i.base);
  }
  template <typename F>
  void for_writes(const Instruction& i, F f) const {
    for (int k = 0; k < i.results; ++k) f(i.result[k]);
  }

  const std::vector<BasicBlock>& blocks() const { return blocks_; }

 private:
  std::size_t index(const Instruction* at) const {
    return static_cast<std::size_t>(at - code_.data());
  }

  void find_blocks() {
    std::vector<bool> begins(code_.size() + 1, false);
    begins[0] = true;
    for (std::size_t i = 0; i < code_.size(); ++i) {
      if (code_[i].flow == Flow::kNext) continue;
      begins[i + 1] = true;
      if (code_[i].target != nullptr) begins[index(code_[i].target)] = true;
    }
    std::vector<std::size_t> block_at(code_.size() + 1);
    for (std::size_t i = 0; i < code_.size(); ++i) {
      if (begins[i]) {
        blocks_.push_back({i, i, Bits(words()), Bits(words()), Bits(words()), Bits(words()), {}});
      }
      blocks_.back().end = i + 1;
      block_at[i] = blocks_.size() - 1;
    }
    for (BasicBlock& block : blocks_) {
      const Instruction& last = code_[block.end - 1];
      if (last.target != nullptr) block.next.push_back(block_at[index(last.target)]);
      const bool falls_through = last.flow == Flow::kNext || last.is_guarded;
      if (falls_through && block.end < code_.size()) block.next.push_back(block_at[block.end]);
    }
  }

  void scan(BasicBlock& block) {
    for (std::size_t i = block.begin; i < block.end; ++i) {
      for_reads(code_[i], [&](std::uint32_t r) {
        if (!has(block.written, r)) set(block.read, r);
      });
      if (code_[i].is_guarded) continue;  // may leave the old value
      for_writes(code_[i], [&](std::uint32_t r) { set(block.written, r); });
    }
    block.live_in = block.read;
  }

  bool propagate() {
    bool changed = false;
    for (auto block = blocks_.rbegin(); block != blocks_.rend(); ++block) {
      for (const std::size_t next : block->next) {
        for (std::size_t w = 0; w < words(); ++w) {
          const std::uint64_t out = blocks_[next].live_in[w] & ~block->live_out[w];
          if (out == 0) continue;
          changed = true;
          block->live_out[w] |= out;
          block->live_in[w] |= out & ~block->written[w];
        }
      }
    }
    return changed;
  }

  std::size_t words() const { return (registers_ + 63) / 64; }

  const std::vector<Instruction>& code_;
  const std::uint32_t registers_;
  std::vector<BasicBlock> blocks_;
};

struct Interval {
  std::size_t begin = SIZE_MAX, end = 0;  // the first and the last instruction; none: begin > end
  std::uint32_t number = 0;

  void include(std::size_t at) {
    begin = std::min(begin, at);
    end = std::max(end, at);
  }
};

std::vector<Interval> intervals_of(const Kernel& kernel, const Liveness& liveness,
                                   std::uint32_t registers) {
  std::vector<Interval> all(registers);
  for (std::uint32_t r = 0; r < registers; ++r) all[r].number = r;
  for (const BasicBlock& block : liveness.blocks()) {
    for_each(block.live_in, [&](std::uint32_t r) { all[r].include(block.begin); });
    for_each(block.live_out, [&](std::uint32_t r) { all[r].include(block.end - 1); });
    for (std::size_t i = block.begin; i < block.end; ++i) {
      const auto include = [&](std::uint32_t r) { all[r].include(i); };
      liveness.for_reads(kernel.code[i], include);
      liveness.for_writes(kernel.code[i], include);
    }
  }
  return all;
}

}  // namespace

void share_slots(Kernel& kernel, std::uint32_t registers,
                 const std::vector<std::uint64_t>& constants) {
  const Liveness liveness(kernel, registers);
  std::vector<Interval> intervals = intervals_of(kernel, liveness, registers);
  std::sort(intervals.begin(), intervals.end(),
            [](const Interval& a, const Interval& b) { return a.begin < b.begin; });

  // Constants come first. Of the free slots the lowest is taken.
  const auto first = static_cast<std::uint32_t>(constants.size());
  std::vector<std::uint32_t> slot_of(registers + constants.size());
  std::priority_queue<std::uint32_t, std::vector<std::uint32_t>, std::greater<>> unused;
  using Used = std::pair<std::size_t, std::uint32_t>;  // the interval's end, slot
  std::priority_queue<Used, std::vector<Used>, std::greater<>> used;
  kernel.slots = first;
  for (const Interval& interval : intervals) {
    if (interval.begin == SIZE_MAX) break;  // never used, like all that follow
    while (!used.empty() && used.top().first < interval.begin) {
      unused.push(used.top().second);
      used.pop();
    }
    if (unused.empty()) unused.push(kernel.slots++);
    slot_of[interval.number] = unused.top();
    used.push({interval.end, unused.top()});
    unused.pop();
  }
  for (std::uint32_t i = 0; i < first; ++i) {
    slot_of[registers + i] = i;
    kernel.initial.push_back({i, constants[i]});
  }
  constexpr std::uint64_t kPoison = 0x7ff57ff57ff57ff5u;
  for_each(liveness.blocks()[0].live_in,
           [&](std::uint32_t r) { kernel.initial.push_back({slot_of[r], kPoison}); });
  for (Instruction& instruction : kernel.code) {
    for (int i = 0; i < instruction.results; ++i) {
      instruction.result[i] = slot_of[instruction.result[i]];
    }
    for (int i = 0; i < instruction.operands; ++i) {
      instruction.operand[i] = slot_of[instruction.operand[i]];
    }
    if (instruction.has_base) instruction.base = slot_of[instruction.base];
  }
}

}  // namespace ptx
}  // namespace emulator
