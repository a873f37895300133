// selftest CASE SEED...: runs one case under each seed and prints its reports, and what is wrong
// with its results. The exit status is 0 where there is neither.
#include <cstdio>
#include <cstdlib>

#include "selftest.h"

namespace {

constexpr float kTolerance = 1e-3f;

std::vector<float> expect(const std::vector<float>& in, const Options& o, Expected expected) {
  std::vector<float> out;
  double total = 0;
  for (const float v : in) total += v;
  switch (expected) {
    case kPerBlock:
    case kPerCluster: {
      const std::size_t group = static_cast<std::size_t>(o.per_block) *
                                static_cast<std::size_t>(expected == kPerCluster ? o.cluster : 1);
      for (std::size_t at = 0; at < in.size(); at += group) {
        double sum = 0;
        for (std::size_t i = at; i < at + group; ++i) sum += in[i];
        out.push_back(static_cast<float>(sum));
      }
      break;
    }
    case kTotal:
      out.push_back(static_cast<float>(total));
      break;
    case kTotalEverywhere:
      out.assign(in.size(), static_cast<float>(total));
      break;
    case kOnes:
      out.assign(static_cast<std::size_t>(o.blocks * o.threads), 1.0f);
      break;
    case kQuads:
      for (std::size_t i = 0; i < in.size(); ++i) out.push_back(in[i ^ 3]);
      break;
    case kCopy: {
      const std::size_t tile = static_cast<std::size_t>(o.threads) * 4;
      for (std::size_t i = 0; i < in.size(); ++i) {
        out.push_back(in[i / tile * tile + tile - 1 - i % tile]);
      }
      break;
    }
    case kWritten:
    case kAnything:
      out.assign(in.size(), 0.0f);
  }
  return out;
}

}  // namespace

Run run_sums(Kernel kernel, const Options& o, Expected expected) {
  return [=]() -> std::string {
    using emulator::Role;
    const auto n = static_cast<std::size_t>(o.blocks * o.per_block);
    Params p;
    float* in = emulator::allocate<float>("in", n, Role::kInput);
    std::vector<float> values(n);
    for (std::size_t i = 0; i < n; ++i) values[i] = static_cast<float>((i * 37 + 11) % 101) / 8;
    std::memcpy(in, values.data(), n * sizeof(float));
    const std::vector<float> right = expect(values, o, expected);
    p.in = in;
    p.out = emulator::allocate<float>("out", right.size(), Role::kOutput);
    p.partial = emulator::allocate<double>("partials", static_cast<std::size_t>(o.blocks),
                                           Role::kWorkspace);
    p.semaphore = emulator::allocate<unsigned>("semaphore", 1, Role::kWorkspace);
    *p.semaphore = 0;
    p.plain = emulator::allocate<float>("plain", n, Role::kWorkspace);
    p.per_block = o.per_block;

    cudaLaunchAttribute attributes[2];
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(static_cast<unsigned>(o.blocks));
    config.blockDim = dim3(static_cast<unsigned>(o.threads));
    config.dynamicSmemBytes = o.shared_bytes;
    config.attrs = attributes;
    if (o.cluster > 0) {
      cudaLaunchAttribute& a = attributes[config.numAttrs++];
      a.id = cudaLaunchAttributeClusterDimension;
      a.val.clusterDim.x = static_cast<unsigned>(o.cluster);
      a.val.clusterDim.y = a.val.clusterDim.z = 1;
    }
    if (o.cooperative) {
      cudaLaunchAttribute& a = attributes[config.numAttrs++];
      a.id = cudaLaunchAttributeCooperative;
      a.val.cooperative = 1;
    }
    const cudaError_t error = cudaLaunchKernelEx(&config, kernel, p);
    if (error == cudaErrorLaunchFailure) return "";  // the reports say why
    if (error != cudaSuccess) return std::string("launch: ") + cudaGetErrorName(error);
    if (expected == kAnything) return "";
    emulator::check_outputs();
    if (expected == kWritten) return "";
    for (std::size_t i = 0; i < right.size(); ++i) {
      if (!(std::abs(p.out[i] - right[i]) <= kTolerance * std::abs(right[i]))) {
        return "element " + std::to_string(i) + " is " + std::to_string(p.out[i]) + ", not " +
               std::to_string(right[i]);
      }
    }
    return "";
  };
}

int main(int argc, char** argv) {
  std::vector<Case> cases;
  add_correct(cases);
  add_exchanges(cases);
  add_broken_order(cases);
  add_broken_calls(cases);
  add_limits(cases);
  add_profiles(cases);
  if (argc < 3) {
    for (const Case& c : cases) std::puts(c.name.c_str());
    std::printf("fibers: %s\n", emulator::fibers());
    return 0;
  }
  bool found = false;
  bool wrong = false;
  for (const Case& c : cases) {
    if (c.name != argv[1]) continue;
    found = true;
    for (int i = 2; i < argc; ++i) {
      emulator::reset();
      emulator::set_device("sm_90");
      emulator::set_seed(std::strtoull(argv[i], nullptr, 10));
      const std::string error = c.run();
      const std::string reports = emulator::report_text();
      if (!error.empty()) std::printf("wrong: %s [seed %s]\n", error.c_str(), argv[i]);
      std::fputs(reports.c_str(), stdout);
      wrong = wrong || !error.empty() || !reports.empty();
    }
  }
  emulator::reset();
  if (!found) std::printf("no case %s\n", argv[1]);
  return wrong || !found ? 1 : 0;
}
