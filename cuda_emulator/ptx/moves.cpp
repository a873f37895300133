// Copies, selections, conversions between integers, vectors of two, special registers.
#include "emulator/device.h"
#include "values.h"

namespace emulator {
namespace ptx {
namespace {

template <typename T>
T copy(T a) {
  return a;
}
template <typename T>
T select(T a, T b, bool first) {
  return first ? a : b;
}
// To the result's width: cut off, or extended by zeros or the sign of `From`.
template <typename To, typename From>
To convert(From a) {
  return static_cast<To>(a);
}

// {low, high}
template <typename Whole, typename Part>
Whole pack(Part low, Part high) {
  return static_cast<Whole>(static_cast<Whole>(low) | static_cast<Whole>(high) << 8 * sizeof(Part));
}
template <typename Whole, typename Part>
const Instruction* unpack(const Instruction* at, Frame& frame) {
  const Whole whole = Value<Whole>::from(frame.slots[at->operand[0]]);
  frame.slots[at->result[0]] = static_cast<Part>(whole);
  frame.slots[at->result[1]] = static_cast<Part>(whole >> 8 * sizeof(Part));
  return at + 1;
}
template <typename Whole, typename Part>
void add_vectors(std::vector<Kind>& kinds, const std::string& name) {
  kinds.push_back({name + " d, {a, b}", Form::kPack, &Operation<pack<Whole, Part>>::execute, 2});
  kinds.push_back({name + " {d, e}, a", Form::kUnpack, &unpack<Whole, Part>, 1});
}

// Read when the instruction is executed, so that a cluster's are checked there.
template <unsigned (*read)()>
const Instruction* special(const Instruction* at, Frame& frame) {
  frame.slots[at->result[0]] = read();
  return at + 1;
}
template <unsigned (*read)()>
void add_special(std::vector<Kind>& kinds, const std::string& name) {
  kinds.push_back({"mov.u32 " + name, Form::kSpecial, &special<read>});
}
unsigned thread() {
  return threadIdx.x;
}
unsigned block() {
  return blockIdx.x;
}
unsigned threads() {
  return blockDim.x;
}
unsigned blocks() {
  return gridDim.x;
}

}  // namespace

void add_moves(std::vector<Kind>& kinds) {
  add_operation<copy<bool>>(kinds, "mov.pred");
  for (const char* type : {"u16", "b16", "s16"}) {
    add_operation<copy<u16>>(kinds, std::string("mov.") + type);
    add_operation<select<u16>>(kinds, std::string("selp.") + type);
  }
  for (const char* type : {"u32", "b32", "s32", "f32"}) {  // of NaNs, all bits
    add_operation<copy<u32>>(kinds, std::string("mov.") + type);
    add_operation<select<u32>>(kinds, std::string("selp.") + type);
  }
  for (const char* type : {"u64", "b64", "s64", "f64"}) {
    add_operation<copy<u64>>(kinds, std::string("mov.") + type);
    add_operation<select<u64>>(kinds, std::string("selp.") + type);
  }
  add_vectors<u32, u16>(kinds, "mov.b32");
  add_vectors<u64, u32>(kinds, "mov.b64");

  add_operation<convert<u16, u32>>(kinds, "cvt.u16.u32");
  add_operation<convert<u32, u16>>(kinds, "cvt.u32.u16");
  add_operation<convert<s32, s16>>(kinds, "cvt.s32.s16");
  add_operation<convert<u32, u64>>(kinds, "cvt.u32.u64");
  add_operation<convert<u64, u32>>(kinds, "cvt.u64.u32");
  add_operation<convert<u64, u16>>(kinds, "cvt.u64.u16");
  add_operation<convert<s64, s32>>(kinds, "cvt.s64.s32");
  // Generic addresses of global memory are those of global memory.
  add_operation<copy<u64>>(kinds, "cvta.to.global.u64");

  add_special<thread>(kinds, "%tid.x");
  add_special<block>(kinds, "%ctaid.x");
  add_special<threads>(kinds, "%ntid.x");
  add_special<blocks>(kinds, "%nctaid.x");
}

}  // namespace ptx
}  // namespace emulator
