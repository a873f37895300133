// From statements to instructions.
#pragma once

#include "text.h"

namespace emulator {
namespace ptx {

// Throws Error, with file and line, where something is not known.
Kernel decode(const ModuleText& module, const EntryText& entry);

// Lets registers share slots that are never needed at the same time (liveness.cpp). On entry the
// code names register r as r, and constant c as `registers + c`.
void share_slots(Kernel& kernel, std::uint32_t registers,
                 const std::vector<std::uint64_t>& constants);

}  // namespace ptx
}  // namespace emulator
