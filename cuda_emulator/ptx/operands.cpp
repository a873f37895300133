#include "operands.h"

#include <algorithm>
#include <cctype>
#include <cstdlib>

namespace emulator {
namespace ptx {
namespace {

bool is_digit(char c) {
  return std::isdigit(static_cast<unsigned char>(c)) != 0;
}

}  // namespace

void Operands::declare(const std::string& text, int line) {
  if (starts_with(text, ".pragma")) return;  // ".pragma "nounroll""
  if (!starts_with(text, ".reg")) fail(module_.file, line, "unknown declaration: " + text);
  // After ".reg" and the type.
  std::size_t names = text.find_first_not_of(" \t", 4);
  names = text.find_first_of(" \t", names);
  for (const std::string& name : split_operands(text.substr(names))) {
    const std::size_t bracket = name.find('<');
    Range range{registers_, 0};
    if (bracket != std::string::npos) {
      range.count = static_cast<std::uint32_t>(std::atoi(name.c_str() + bracket + 1));
    }
    registers_ += std::max(range.count, 1u);
    scopes_.back()[name.substr(0, bracket)] = range;
  }
}

std::uint32_t Operands::find_register(const std::string& text, int line) const {
  std::size_t digits = text.size();
  while (digits > 0 && is_digit(text[digits - 1])) --digits;
  const std::string prefix = text.substr(0, digits);
  for (auto scope = scopes_.rbegin(); scope != scopes_.rend(); ++scope) {
    const auto exact = scope->find(text);
    if (exact != scope->end() && exact->second.count == 0) return exact->second.first;
    const auto range = scope->find(prefix);
    if (range == scope->end() || digits == text.size()) continue;
    const auto number = static_cast<std::uint32_t>(std::atoi(text.c_str() + digits));
    if (number < range->second.count) return range->second.first + number;
  }
  fail(module_.file, line, "there is no register " + text);
}

std::uint64_t Operands::value_of(const std::string& text, int line) const {
  const bool is_number = is_digit(text[0]) || (text[0] == '-' && text.size() > 1);
  if (is_number) {
    // 0f3F800000 and 0d3FF0000000000000 are the bits of a float and of a double.
    const char kind = text.size() > 1 ? static_cast<char>(std::tolower(text[1])) : ' ';
    const bool is_float = text[0] == '0' && (kind == 'f' || kind == 'd');
    const char* begin = text.c_str() + (is_float ? 2 : 0);
    char* end = nullptr;
    const std::uint64_t value = text[0] == '-'
                                    ? static_cast<std::uint64_t>(std::strtoll(begin, &end, 0))
                                    : std::strtoull(begin, &end, is_float ? 16 : 0);
    if (*end == 'U') ++end;
    if (*end == '\0') return value;
  }
  for (const Parameter& parameter : entry_.parameters) {
    if (parameter.name == text) return kParameterBase + parameter.offset;
  }
  const auto& shared = module_.dynamic_shared;
  if (std::find(shared.begin(), shared.end(), text) != shared.end()) return kSharedBase;
  fail(module_.file, line, "unknown operand: " + text);
}

std::uint32_t Operands::result(const std::string& text, int line) {
  return text == "_" ? registers_++ : find_register(text, line);
}

std::uint32_t Operands::operand(const std::string& text, int line) {
  if (text.empty()) fail(module_.file, line, "an operand is missing");
  if (text[0] == '%') return find_register(text, line);
  const std::uint64_t value = value_of(text, line);
  const auto added = numbers_.emplace(value, static_cast<std::uint32_t>(constants_.size()));
  if (added.second) constants_.push_back(value);
  return kConstant | added.first->second;
}

}  // namespace ptx
}  // namespace emulator
