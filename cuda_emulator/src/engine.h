// What executes a kernel: its source, compiled by the host compiler, or another engine.
#pragma once

#include <vector>

#include "machine.h"

namespace emulator {
namespace detail {

// Prepares a launch: sets `body` and `context`, or returns the error that the launch returns.
using Engine = cudaError_t (*)(Launch& launch, const std::vector<Argument>& arguments);

// Used from the next launch on. Null: the kernels' source.
void set_engine(Engine engine);

}  // namespace detail
}  // namespace emulator
