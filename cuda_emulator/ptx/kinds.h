// The instructions that the interpreter knows. An instruction whose exact name, with all that stands
// behind its points, is not listed is refused: a modifier always means something.
#pragma once

#include <string>
#include <vector>

#include "program.h"

namespace emulator {
namespace ptx {

// How the operands of an instruction are written.
enum class Form : unsigned char {
  kNone,         // membar.gl
  kLabel,        // bra $L
  kValues,       // add.s32 d, a, b: as many operands as `operands` says
  kPack,         // mov.b32 d, {a, b}
  kUnpack,       // mov.b32 {d, e}, a
  kSpecial,      // mov.u32 d, %tid.x: the kind is named "mov.u32 %tid.x"
  kLoad,         // ld.global.v2.f32 {d, e}, [address]
  kStore,        // st.global.f32 [address], a
  kAddress,      // prefetch.global.L2 [address]
  kAtomic,       // atom.global.add.u32 d, [address], a
  kShuffle,      // shfl.sync.bfly.b32 d|p, a, b, 31, mask
  kBarrier,      // bar.sync 0
  kBarrierVote,  // bar.red.or.pred p, 0, q
  kAsyncCopy,    // cp.async.cg.shared.global [to], [from], 16
  kNumber,       // cp.async.wait_group 0
  kClusterWait,  // barrier.cluster.wait, directly after barrier.cluster.arrive
};

struct Kind {
  std::string name;
  Form form;
  Execute execute;
  int operands = 0;        // of kValues
  int count = 1;           // elements of a vector in memory
  int bytes = 0;           // of an element
  bool is_signed = false;  // of an element
};

// Null: there is no such kind.
const Kind* find_kind(const std::string& name);
const std::vector<Kind>& all_kinds();  // sorted by name

// The parts of the list.
void add_integers(std::vector<Kind>& kinds);   // integers.cpp
void add_floats(std::vector<Kind>& kinds);     // floats.cpp
void add_moves(std::vector<Kind>& kinds);      // moves.cpp
void add_accesses(std::vector<Kind>& kinds);   // accesses.cpp
void add_exchanges(std::vector<Kind>& kinds);  // exchanges.cpp

}  // namespace ptx
}  // namespace emulator
