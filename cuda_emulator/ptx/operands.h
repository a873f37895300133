// The names in a kernel's body: registers, constants, parameters, shared memory.
#pragma once

#include <map>
#include <unordered_map>

#include "text.h"

namespace emulator {
namespace ptx {

class Operands {
 public:
  Operands(const ModuleText& module, const EntryText& entry) : module_(module), entry_(entry) {}

  void open_scope() { scopes_.emplace_back(); }
  void close_scope() { scopes_.pop_back(); }
  // ".reg .b32 %r<12>" or ".reg .u64 %tmp"
  void declare(const std::string& text, int line);

  // A register for a result; "_" stands for one that nobody reads.
  std::uint32_t result(const std::string& text, int line);
  // A register, or a constant: kConstant and its number.
  std::uint32_t operand(const std::string& text, int line);
  static constexpr std::uint32_t kConstant = 0x80000000u;

  std::uint32_t registers() const { return registers_; }
  const std::vector<std::uint64_t>& constants() const { return constants_; }

 private:
  struct Range {
    std::uint32_t first;
    std::uint32_t count;  // %r<12> declares %r0 to %r11; 0: only the name itself
  };

  std::uint32_t find_register(const std::string& text, int line) const;
  std::uint64_t value_of(const std::string& text, int line) const;

  const ModuleText& module_;
  const EntryText& entry_;
  std::vector<std::unordered_map<std::string, Range>> scopes_{1};
  std::uint32_t registers_ = 0;
  std::vector<std::uint64_t> constants_;
  std::map<std::uint64_t, std::uint32_t> numbers_;  // of the constants
};

}  // namespace ptx
}  // namespace emulator
