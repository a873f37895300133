#include "kinds.h"

#include <algorithm>
#include <unordered_map>

#include "emulator/ptx.h"

namespace emulator {
namespace ptx {

const std::vector<Kind>& all_kinds() {
  static const std::vector<Kind> all = [] {
    std::vector<Kind> kinds;
    add_integers(kinds);
    add_floats(kinds);
    add_moves(kinds);
    add_accesses(kinds);
    add_exchanges(kinds);
    std::sort(kinds.begin(), kinds.end(),
              [](const Kind& a, const Kind& b) { return a.name < b.name; });
    return kinds;
  }();
  return all;
}

const Kind* find_kind(const std::string& name) {
  static const auto* by_name = [] {
    auto* map = new std::unordered_map<std::string, const Kind*>();
    for (const Kind& kind : all_kinds()) (*map)[kind.name] = &kind;
    return map;
  }();
  const auto found = by_name->find(name);
  return found == by_name->end() ? nullptr : found->second;
}

}  // namespace ptx

std::vector<std::string> ptx_kinds() {
  std::vector<std::string> names;
  for (const ptx::Kind& kind : ptx::all_kinds()) names.push_back(kind.name);
  return names;
}

}  // namespace emulator
