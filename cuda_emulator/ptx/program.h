// A kernel as the interpreter executes it. All names are resolved when a kernel is decoded; nothing
// is looked up while it runs.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace emulator {
namespace ptx {

// "file.ptx:12: unknown instruction ..."
struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct Instruction;

// What one thread executes with.
struct Frame {
  std::uint64_t* slots;  // registers and constants
  const unsigned char* parameters;
  std::size_t parameter_bytes;
};

// Executes one instruction; returns the next one, or null at the end of the thread.
using Execute = const Instruction* (*)(const Instruction* at, Frame& frame);

enum class Flow : std::uint8_t { kNext, kBranch, kEnd };

// A register is a slot of 8 bytes. An instruction reads as many of its low bytes as its type has,
// and writes all of it, so that the bytes above the type do not matter. A constant is a slot that
// nothing writes.
struct Instruction {
  Execute execute = nullptr;
  std::uint32_t result[4] = {};
  std::uint32_t operand[4] = {};
  std::uint32_t base = 0;                  // slot of an address ...
  std::int64_t offset = 0;                 // ... to which this is added
  const Instruction* target = nullptr;     // of a branch
  std::uint8_t results = 0, operands = 0;  // how many
  std::uint8_t bytes = 0;                  // of an element in memory
  bool is_signed = false;                  // a narrow element is extended by its sign
  bool has_base = false;
  bool negated = false;     // a guard that holds where its predicate is false
  bool is_guarded = false;  // it may be skipped
  Flow flow = Flow::kNext;
  int line = 0;
  const std::string* kind = nullptr;  // null: the guard of the next instruction
  mutable std::uint64_t times = 0;    // executed
};

struct Parameter {
  std::string name;
  std::size_t bytes = 0;
  std::size_t offset = 0;
};

struct Kernel {
  std::string entry;  // mangled
  std::string file;
  int architecture = 0;  // 80, 90, ...
  std::vector<Parameter> parameters;
  std::size_t parameter_bytes = 0;
  std::vector<Instruction> code;
  std::uint32_t slots = 0;  // that a thread needs
  // Slots that have a value before the first instruction: constants, and registers that may be read
  // before they are written, which get a pattern that is NaN in every format.
  std::vector<std::pair<std::uint32_t, std::uint64_t>> initial;
  std::uint64_t launches = 0;
};

// Addresses as a thread sees them. Those of global memory are those of the host. Shared addresses,
// and addresses of parameters, begin where no valid offset of the other kind is.
constexpr std::uint64_t kSharedBase = 1024;  // of dynamic shared memory
constexpr std::uint64_t kParameterBase = 0x40000;

}  // namespace ptx
}  // namespace emulator
