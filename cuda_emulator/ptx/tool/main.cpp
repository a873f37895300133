// ptx kinds                     the kinds of instructions that the interpreter knows
// ptx list FILE                 a line for each instruction of each kernel in a .ptx file
// ptx run FOLDER DEVICE BLOCKS THREADS SHARED CLUSTER SEED IN OUT BYTES
//                               runs the kernel `program(in, out)` of a folder: `in` is the file IN,
//                               `out` are BYTES bytes, which are written to the file OUT
//
// Reports are printed; the exit status is 1 where there are any.
#include <emulator.h>
#include <emulator/ptx.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <fstream>
#include <iterator>
#include <string>
#include <vector>

// The PTX of this name runs in its place.
extern "C" __global__ void program(const char*, char*) {}

namespace {

int run(char** argument) {
  emulator::reset();
  emulator::use_ptx(argument[0]);
  if (!emulator::set_device(argument[1])) return 2;
  emulator::set_seed(std::strtoull(argument[6], nullptr, 10));
  emulator::set_shuffles_order_memory(false);
  std::ifstream file(argument[7], std::ios::binary);
  const std::string given((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
  const std::size_t bytes = std::strtoull(argument[9], nullptr, 10);
  char* in = emulator::allocate<char>("in", given.size(), emulator::Role::kInput);
  std::memcpy(in, given.data(), given.size());
  char* out = emulator::allocate<char>("out", bytes, emulator::Role::kInOut);
  std::memset(out, 0, bytes);

  cudaLaunchAttribute cluster{};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(std::atoi(argument[2])));
  config.blockDim = dim3(static_cast<unsigned>(std::atoi(argument[3])));
  config.dynamicSmemBytes = std::strtoull(argument[4], nullptr, 10);
  if (const auto blocks = static_cast<unsigned>(std::atoi(argument[5]))) {
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim = {blocks, 1, 1};
    config.attrs = &cluster;
    config.numAttrs = 1;
  }
  const cudaError_t error = cudaLaunchKernelEx(&config, program, in, out);
  if (error != cudaSuccess) std::printf("launch: %s\n", cudaGetErrorName(error));
  std::fputs(emulator::report_text().c_str(), stdout);
  std::ofstream(argument[8], std::ios::binary).write(out, static_cast<std::streamsize>(bytes));
  return error != cudaSuccess || !emulator::reports().empty() ? 1 : 0;
}

}  // namespace

int main(int count, char** arguments) {
  const std::string command = count > 1 ? arguments[1] : "";
  try {
    if (command == "kinds" && count == 2) {
      for (const std::string& name : emulator::ptx_kinds()) std::puts(name.c_str());
      return 0;
    }
    if (command == "list" && count == 3) {
      std::fputs(emulator::list_ptx(arguments[2]).c_str(), stdout);
      return 0;
    }
    if (command == "run" && count == 12) return run(arguments + 2);
  } catch (const std::exception& error) {
    std::printf("%s\n", error.what());
    return 1;
  }
  std::puts("usage: ptx kinds | list FILE | run ...; see cuda_emulator/ptx/tool/main.cpp");
  return 2;
}
