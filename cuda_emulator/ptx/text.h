// The text of a .ptx file, in statements.
#pragma once

#include <string>
#include <vector>

#include "program.h"

namespace emulator {
namespace ptx {

struct Statement {
  enum Type { kInstruction, kLabel, kDeclaration, kOpen, kClose };
  Type type;
  int line;
  std::string text;  // without the ";" or ":" at its end
};

// One kernel, not decoded.
struct EntryText {
  std::string name;  // mangled
  std::vector<Parameter> parameters;
  std::size_t parameter_bytes = 0;
  std::size_t begin = 0, end = 0;  // of its body in the module's text
  int line = 0;                    // at `begin`
};

struct ModuleText {
  std::string file;
  std::string text;  // without comments
  int architecture = 0;
  std::vector<std::string> dynamic_shared;  // names of arrays without a size
  std::vector<EntryText> entries;
};

ModuleText read_module(const std::string& path);
std::vector<Statement> statements_of(const ModuleText& module, const EntryText& entry);

std::string trim(const std::string& text);
// At commas outside of braces and brackets; each part is trimmed.
std::vector<std::string> split_operands(const std::string& text);
bool starts_with(const std::string& text, const std::string& prefix);

[[noreturn]] void fail(const std::string& file, int line, const std::string& what);

}  // namespace ptx
}  // namespace emulator
