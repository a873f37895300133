// Running kernels as the PTX that a compiler made of them, in place of their source. For tests.
#pragma once

#include <string>
#include <vector>

namespace emulator {

// From the next launch on, kernels are executed as the PTX of the .ptx files in `folder`. A device
// takes the code with the highest architecture that is not newer than the device. A launch whose
// kernel is in no file, or cannot be decoded, is reported and returns CUDA's error. An empty string
// selects the source again.
void use_ptx(const std::string& folder);

// Moves each result of the instructions that PTX calls approximate by `units` in the last place,
// where hardware is free to round otherwise: ex2.approx is within 2 units, rcp.approx within 1.
void set_approximation_error(int units);

// Writes of each kernel that was launched a line "kernel <file> <kernel> <launches>", and one for
// each of its instructions: "<line> <times executed> <kind>".
void write_ptx_coverage(const std::string& path);

// A line for each instruction of every kernel of a file: "<kernel> <line> <kind>". Throws
// std::runtime_error, with file and line, where one is not known.
std::string list_ptx(const std::string& file);

// All kinds of instructions that are known, sorted.
std::vector<std::string> ptx_kinds();

}  // namespace emulator
