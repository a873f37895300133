// Which launches are refused, and the device's own figures.
#include <cstdio>

#include "selftest.h"

namespace {

__global__ void nothing(int) {}
__global__ void nothing_else(int) {}

struct Config {
  cudaLaunchConfig_t config{};
  cudaLaunchAttribute attributes[2];

  Config(dim3 grid, dim3 block, std::size_t shared = 0) {
    config.gridDim = grid;
    config.blockDim = block;
    config.dynamicSmemBytes = shared;
    config.attrs = attributes;
  }
  Config& cluster(unsigned x) {
    cudaLaunchAttribute& a = attributes[config.numAttrs++];
    a.id = cudaLaunchAttributeClusterDimension;
    a.val.clusterDim.x = x;
    a.val.clusterDim.y = a.val.clusterDim.z = 1;
    return *this;
  }
  Config& cooperative() {
    cudaLaunchAttribute& a = attributes[config.numAttrs++];
    a.id = cudaLaunchAttributeCooperative;
    a.val.cooperative = 1;
    return *this;
  }
  cudaError_t launch(void (*kernel)(int) = nothing) {
    return cudaLaunchKernelEx(&config, kernel, 0);
  }
};

class Checks {
 public:
  void equal(const char* what, long long is, long long expected) {
    if (is == expected) return;
    text_ += std::string(what) + " is " + std::to_string(is) + ", not " + std::to_string(expected) +
             "; ";
  }
  void error(const char* what, cudaError_t is, cudaError_t expected) {
    if (is == expected) return;
    text_ += std::string(what) + " gives " + cudaGetErrorName(is) + ", not " +
             cudaGetErrorName(expected) + "; ";
  }
  const std::string& text() const { return text_; }

 private:
  std::string text_;
};

int attribute(cudaDeviceAttr a) {
  int value = -1;
  return cudaDeviceGetAttribute(&value, a, 0) == cudaSuccess ? value : -1;
}

int blocks_per_sm(int threads, std::size_t shared) {
  int blocks = -1;
  cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, nothing, threads, shared);
  return blocks;
}

std::string check_shapes() {
  Checks check;
  check.error("a launch", Config(3, 32).launch(), cudaSuccess);
  check.error("1025 threads", Config(1, 1025).launch(), cudaErrorInvalidConfiguration);
  check.error("64 x 32 threads", Config(1, dim3(64, 32)).launch(), cudaErrorInvalidConfiguration);
  check.error("65 layers of threads", Config(1, dim3(1, 1, 65)).launch(),
              cudaErrorInvalidConfiguration);
  check.error("no threads", Config(1, dim3(0, 1)).launch(), cudaErrorInvalidConfiguration);
  check.error("no blocks", Config(dim3(1, 0), 32).launch(), cudaErrorInvalidConfiguration);
  check.error("too many blocks", Config(0x80000000u, 32).launch(), cudaErrorInvalidConfiguration);
  check.error("too many rows", Config(dim3(1, 65536), 32).launch(), cudaErrorInvalidConfiguration);
  check.error("the last error", cudaPeekAtLastError(), cudaErrorInvalidConfiguration);
  check.error("taking it", cudaGetLastError(), cudaErrorInvalidConfiguration);
  check.error("taking it again", cudaGetLastError(), cudaSuccess);
  const auto& launches = emulator::launches();
  check.equal("the number of launches", static_cast<long long>(launches.size()), 8);
  check.equal("the grid", launches[0].grid.x, 3);
  check.equal("the block", launches[0].block.x, 32);
  check.equal("named", launches[0].kernel == "nothing", 1);
  check.error("the recorded result", launches[1].result, cudaErrorInvalidConfiguration);
  return check.text();
}

std::string check_shared_memory() {
  Checks check;
  const struct {
    const char* device;
    int opt_in, blocks;  // the blocks of 256 threads with 16 KB of shared memory
  } devices[] = {{"sm_75", 65536, 4},
                 {"sm_80", 166912, 8},
                 {"sm_86", 101376, 5},
                 {"sm_90", 232448, 8},
                 {"sm_120", 101376, 5}};
  for (const auto& d : devices) {
    emulator::reset();
    emulator::set_device(d.device, 5);
    const auto opt_in = static_cast<std::size_t>(d.opt_in);
    check.equal("processors", attribute(cudaDevAttrMultiProcessorCount), 5);
    check.equal("the opt-in", attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin), d.opt_in);
    check.equal("blocks", blocks_per_sm(256, 16384), d.blocks);
    check.error("48 KB", Config(1, 32, 49152).launch(), cudaSuccess);
    check.error("more than 48 KB", Config(1, 32, 49153).launch(), cudaErrorInvalidValue);
    check.error(
        "opting in",
        cudaFuncSetAttribute(nothing, cudaFuncAttributeMaxDynamicSharedMemorySize, d.opt_in),
        cudaSuccess);
    check.error("all of it", Config(1, 32, opt_in).launch(), cudaSuccess);
    check.equal("blocks with all of it", blocks_per_sm(32, opt_in), 1);
    check.error("another kernel", Config(1, 32, opt_in).launch(nothing_else),
                cudaErrorInvalidValue);
    check.error(
        "opting in to more",
        cudaFuncSetAttribute(nothing, cudaFuncAttributeMaxDynamicSharedMemorySize, d.opt_in + 1),
        cudaErrorInvalidValue);
  }
  return check.text();
}

std::string check_clusters() {
  Checks check;
  emulator::set_device("sm_80");
  check.equal("sm_80 with clusters", attribute(cudaDevAttrClusterLaunch), 0);
  check.error("a cluster on sm_80", Config(4, 32).cluster(2).launch(), cudaErrorNotSupported);
  emulator::set_device("sm_90", 8);
  check.equal("sm_90 with clusters", attribute(cudaDevAttrClusterLaunch), 1);
  check.error("a cluster", Config(4, 32).cluster(2).launch(), cudaSuccess);
  check.error("an odd grid", Config(5, 32).cluster(2).launch(), cudaErrorInvalidConfiguration);
  check.error("a wide cluster", Config(16, 32).cluster(16).launch(), cudaErrorInvalidClusterSize);
  cudaFuncSetAttribute(nothing, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  check.error("a wide cluster, allowed", Config(16, 32).cluster(16).launch(), cudaSuccess);
  int clusters = -1;
  Config big(16, 1024, 200 * 1024);
  big.cluster(8);
  check.error("clusters of too much memory",
              cudaOccupancyMaxActiveClusters(&clusters, nothing, &big.config),
              cudaErrorInvalidValue);
  cudaFuncSetAttribute(nothing, cudaFuncAttributeMaxDynamicSharedMemorySize, 200 * 1024);
  check.error("asking for clusters",
              cudaOccupancyMaxActiveClusters(&clusters, nothing, &big.config), cudaSuccess);
  check.equal("clusters of 8 processors", clusters, 1);
  emulator::set_device("sm_90", 4);
  cudaOccupancyMaxActiveClusters(&clusters, nothing, &big.config);
  check.equal("clusters of 4 processors", clusters, 0);
  check.error("a cluster that does not fit", big.launch(), cudaErrorLaunchOutOfResources);
  emulator::refuse_next_cluster_launch();
  check.error("a plain launch", Config(4, 32).launch(), cudaSuccess);
  check.error("a refusal", Config(4, 32).cluster(2).launch(), cudaErrorLaunchOutOfResources);
  check.error("the next one", Config(4, 32).cluster(2).launch(), cudaSuccess);
  return check.text();
}

std::string check_cooperative() {
  Checks check;
  emulator::set_device("sm_86", 3);
  const auto fits = static_cast<unsigned>(3 * blocks_per_sm(512, 0));
  check.equal("blocks", fits, 9);
  check.error("as many as fit", Config(fits, 512).cooperative().launch(), cudaSuccess);
  check.error("one more", Config(fits + 1, 512).cooperative().launch(),
              cudaErrorCooperativeLaunchTooLarge);
  emulator::refuse_next_cooperative_launch();
  check.error("a refusal", Config(1, 512).cooperative().launch(),
              cudaErrorCooperativeLaunchTooLarge);
  check.error("the next one", Config(1, 512).cooperative().launch(), cudaSuccess);
  emulator::refuse_launch_after(1, cudaErrorMemoryAllocation);
  check.error("one before", Config(1, 512).launch(), cudaSuccess);
  check.error("another refusal", Config(1, 512).launch(), cudaErrorMemoryAllocation);
  check.error("one after", Config(1, 512).launch(), cudaSuccess);
  return check.text();
}

}  // namespace

void add_limits(std::vector<Case>& cases) {
  cases.push_back({"shapes", check_shapes});
  cases.push_back({"shared_memory", check_shared_memory});
  cases.push_back({"clusters", check_clusters});
  cases.push_back({"cooperative", check_cooperative});
}
