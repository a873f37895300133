#include "text.h"

#include <algorithm>
#include <cctype>
#include <cstdlib>
#include <fstream>
#include <iterator>

namespace emulator {
namespace ptx {
namespace {

std::string without_comments(const std::string& raw) {
  std::string text;
  text.reserve(raw.size());
  for (std::size_t at = 0; at < raw.size(); ++at) {
    if (raw.compare(at, 2, "//") == 0) {
      at = raw.find('\n', at);
      if (at == std::string::npos) break;
    }
    text += raw[at];
  }
  return text;
}

// The word after `keyword`, which begins at `at`.
std::string word_after(const std::string& text, std::size_t at, const std::string& keyword) {
  const std::size_t begin = text.find_first_not_of(" \t", at + keyword.size());
  const std::size_t end = text.find_first_of(" \t\n\r;,([", begin);
  return text.substr(begin, end - begin);
}

// ".param .align 8 .b8 name[392]" or ".param .u64 name"
Parameter parse_parameter(const std::string& text) {
  Parameter parameter;
  std::size_t alignment = 1, element = 1, count = 1;
  std::size_t at = 0;
  while (at < text.size()) {
    const std::size_t end = std::min(text.find_first_of(" \t\n", at), text.size());
    const std::string word = text.substr(at, end - at);
    at = text.find_first_not_of(" \t\n", end);
    if (word == ".align") {
      alignment = std::strtoull(text.c_str() + at, nullptr, 10);
    } else if (word.size() > 2 && word[0] == '.' &&
               std::isdigit(static_cast<unsigned char>(word[2]))) {
      element = std::strtoull(word.c_str() + 2, nullptr, 10) / 8;
    } else if (word[0] != '.' && !std::isdigit(static_cast<unsigned char>(word[0]))) {
      const std::size_t bracket = word.find('[');
      parameter.name = word.substr(0, bracket);
      if (bracket != std::string::npos)
        count = std::strtoull(word.c_str() + bracket + 1, nullptr, 10);
    }
  }
  parameter.bytes = element * count;
  parameter.offset = std::max(alignment, element);  // of which it is a multiple, see below
  return parameter;
}

void place_parameters(EntryText& entry, const std::string& list) {
  for (const std::string& text : split_operands(list)) {
    Parameter parameter = parse_parameter(text);
    const std::size_t alignment = parameter.offset;
    parameter.offset = (entry.parameter_bytes + alignment - 1) / alignment * alignment;
    entry.parameter_bytes = parameter.offset + parameter.bytes;
    entry.parameters.push_back(parameter);
  }
}

}  // namespace

void fail(const std::string& file, int line, const std::string& what) {
  throw Error(file + ":" + std::to_string(line) + ": " + what);
}

std::string trim(const std::string& text) {
  const char* space = " \t\n\r";
  const std::size_t begin = text.find_first_not_of(space);
  if (begin == std::string::npos) return "";
  return text.substr(begin, text.find_last_not_of(space) - begin + 1);
}

bool starts_with(const std::string& text, const std::string& prefix) {
  return text.compare(0, prefix.size(), prefix) == 0;
}

std::vector<std::string> split_operands(const std::string& text) {
  std::vector<std::string> parts;
  std::string part;
  int depth = 0;
  for (const char c : text) {
    if (c == '{' || c == '[') ++depth;
    if (c == '}' || c == ']') --depth;
    if (c == ',' && depth == 0) {
      parts.push_back(trim(part));
      part.clear();
    } else {
      part += c;
    }
  }
  if (!trim(part).empty()) parts.push_back(trim(part));
  return parts;
}

ModuleText read_module(const std::string& path) {
  std::ifstream in(path);
  ModuleText module;
  module.file = path.substr(path.rfind('/') + 1);
  if (!in) fail(module.file, 0, "cannot be read");
  const std::string raw((std::istreambuf_iterator<char>(in)), std::istreambuf_iterator<char>());
  module.text = without_comments(raw);
  const std::string& text = module.text;

  const std::size_t target = text.find(".target");
  if (target == std::string::npos) fail(module.file, 1, "there is no .target");
  module.architecture = std::atoi(word_after(text, target, ".target").c_str() + 3);  // "sm_80"

  const std::string shared = ".extern .shared";
  for (std::size_t at = text.find(shared); at != std::string::npos;
       at = text.find(shared, at + 1)) {
    const std::size_t end = text.find('[', at);
    const std::size_t begin = text.find_last_of(" \t", end) + 1;
    module.dynamic_shared.push_back(text.substr(begin, end - begin));
  }

  const std::string keyword = ".entry";
  int line = 1;
  std::size_t counted = 0;
  for (std::size_t at = text.find(keyword); at != std::string::npos;
       at = text.find(keyword, at + 1)) {
    EntryText entry;
    entry.name = word_after(text, at, keyword);
    const std::size_t open = text.find('(', at), close = text.find(')', open);
    place_parameters(entry, text.substr(open + 1, close - open - 1));
    entry.begin = text.find('{', close) + 1;
    int depth = 1;
    for (entry.end = entry.begin; entry.end < text.size() && depth > 0; ++entry.end) {
      if (text[entry.end] == '{') ++depth;
      if (text[entry.end] == '}') --depth;
    }
    --entry.end;
    for (; counted < entry.begin; ++counted) line += text[counted] == '\n';
    entry.line = line;
    if (depth != 0) fail(module.file, line, "the body of " + entry.name + " does not end");
    module.entries.push_back(entry);
  }
  return module;
}

std::vector<Statement> statements_of(const ModuleText& module, const EntryText& entry) {
  std::vector<Statement> all;
  std::string text;
  int line = entry.line, begun = line;
  // Braces of vector operands, "{%r1, %r2}", are within a statement; those of a scope are between
  // two.
  int vector = 0;
  for (std::size_t at = entry.begin; at < entry.end; ++at) {
    const char c = module.text[at];
    if (c == '\n') ++line;
    if (text.empty() && std::isspace(static_cast<unsigned char>(c))) continue;
    if (text.empty()) {
      begun = line;
      if (c == '{' || c == '}') {
        all.push_back({c == '{' ? Statement::kOpen : Statement::kClose, line, ""});
        continue;
      }
    }
    if (c == '{') ++vector;
    if (c == '}') --vector;
    if (c == ';') {
      text = trim(text);
      all.push_back(
          {text[0] == '.' ? Statement::kDeclaration : Statement::kInstruction, begun, text});
      text.clear();
    } else if (c == ':' && vector == 0 && text[0] == '$') {
      all.push_back({Statement::kLabel, begun, trim(text)});
      text.clear();
    } else {
      text += c;
    }
  }
  if (!trim(text).empty()) fail(module.file, begun, "not a statement: " + trim(text));
  return all;
}

}  // namespace ptx
}  // namespace emulator
