// Control flow, and what threads do together: barriers, shuffles, votes, fences.
#include "machine.h"
#include "values.h"

namespace emulator {
namespace ptx {
namespace {

using detail::Where;

const Instruction* branch(const Instruction* at, Frame&) {
  return at->target;
}

const Instruction* end(const Instruction*, Frame&) {
  return nullptr;
}

const Instruction* barrier(const Instruction* at, Frame&) {
  detail::block_barrier(Where::kSyncthreads, 0);
  return at + 1;
}
const Instruction* barrier_or(const Instruction* at, Frame& frame) {
  const bool own = Value<bool>::from(frame.slots[at->operand[0]]);
  frame.slots[at->result[0]] = detail::block_barrier(Where::kSyncthreadsOr, own) != 0;
  return at + 1;
}

// The emulator's barrier of a cluster arrives and waits at once.
const Instruction* arrive(const Instruction* at, Frame&) {
  return at + 1;
}
const Instruction* wait(const Instruction* at, Frame&) {
  detail::cluster_barrier();
  return at + 1;
}

const Instruction* fence(const Instruction* at, Frame&) {
  detail::fence(true);
  return at + 1;
}

// Time does not pass here: others run.
const Instruction* sleep(const Instruction* at, Frame&) {
  detail::sleep();
  return at + 1;
}

// From the lane whose number differs by the bits of b, in segments of a whole warp (c is 31). All
// lanes of the mask are in range, so that the predicate is true.
const Instruction* shuffle(const Instruction* at, Frame& frame) {
  u64* slots = frame.slots;
  const auto own = static_cast<u32>(slots[at->operand[0]]);
  const auto lane_mask = static_cast<int>(static_cast<u32>(slots[at->operand[1]]));
  if (static_cast<u32>(slots[at->operand[2]]) != 31) {
    detail::report_fatal("ptx", "shuffles within a part of the warp, which is not modelled");
  }
  u32 result = 0;
  detail::warp_collective(Where::kShflXor, static_cast<u32>(slots[at->operand[3]]), lane_mask, 32,
                          sizeof(own), &own, &result);
  slots[at->result[0]] = result;
  if (at->results == 2) slots[at->result[1]] = 1;
  return at + 1;
}

// Whether the predicate holds in any, or all, of the mask's lanes.
template <Where kVote>
const Instruction* vote(const Instruction* at, Frame& frame) {
  const u32 own = Value<bool>::from(frame.slots[at->operand[0]]);
  u32 result = 0;
  detail::warp_collective(kVote, static_cast<u32>(frame.slots[at->operand[1]]), 0, 32, sizeof(own),
                          &own, &result);
  frame.slots[at->result[0]] = result != 0;
  return at + 1;
}

}  // namespace

void add_exchanges(std::vector<Kind>& kinds) {
  kinds.push_back({"bra", Form::kLabel, &branch});
  kinds.push_back({"bra.uni", Form::kLabel, &branch});
  kinds.push_back({"ret", Form::kNone, &end});
  kinds.push_back({"bar.sync", Form::kBarrier, &barrier});
  kinds.push_back({"bar.red.or.pred", Form::kBarrierVote, &barrier_or});
  kinds.push_back({"barrier.cluster.arrive", Form::kNone, &arrive});
  kinds.push_back({"barrier.cluster.wait", Form::kClusterWait, &wait});
  kinds.push_back({"membar.gl", Form::kNone, &fence});
  kinds.push_back({"nanosleep.u32", Form::kNumber, &sleep});
  kinds.push_back({"shfl.sync.bfly.b32", Form::kShuffle, &shuffle});
  kinds.push_back({"vote.sync.any.pred", Form::kValues, &vote<Where::kAny>, 2});
  kinds.push_back({"vote.sync.all.pred", Form::kValues, &vote<Where::kAll>, 2});
}

}  // namespace ptx
}  // namespace emulator
