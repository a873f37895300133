// The CPU kernels and csrc/cpu/parallel.h on plain threads, without torch.
//
//   driver threads ISA    Results of several threads have the bits of one, over shapes that take every
//                         way of dividing the work. Under ThreadSanitizer a race ends the program.
//   driver numbers ISA    All results beside plain loops in double (plain.h), for every dtype, and
//                         their bits as one number, to compare machines by.
//   driver choice         Prints the instruction set that the package would choose.
//
// Exit code 0: as it should be; 1: not; 2: this CPU does not have the instruction set.
#include <cpu/capability.h>

#include <cstdio>
#include <stdexcept>
#include <string>

#include "plain.h"

namespace {

constexpr auto kFirst = Layout::ChannelsFirst;

int threads() {
  const Case cases[] = {
      {"long rows", {2, 3, 20011, kFirst}, Activation::Identity, false},
      {"images", {5, 16, 400, kFirst}, Activation::Relu, true},
      {"short rows", {37, 61, 49, kFirst}, Activation::Relu, true},
      {"uneven shares", {16, 160, 49, kFirst}, Activation::Silu, true},
      {"channels last", {3 * 272, 67, 1, kFirst}, Activation::Relu, true},
      {"folded samples", {20009, 3, 1, kFirst}, Activation::Relu6, true},
      {"one channel", {1, 1, 50503, kFirst}, Activation::Hardswish, false},
      {"many channels", {520, 1100, 1, kFirst}, Activation::LeakyRelu, true},
      {"by cache block", {8, 16, 33124, kFirst}, Activation::Identity, false},
      {"by cache block, masks", {70, 64, 841, kFirst}, Activation::Relu, true},
  };
  int worst = 0;
  for (const Case& c : cases) {
    const Inputs in(c, DType::Float);
    const Results one = results_of(c, DType::Float, 1, in);
    for (const int count : {2, 5}) {
      if (results_of(c, DType::Float, count, in) == one) continue;
      std::printf("%s: other bits with %d threads\n", c.name, count);
      worst = 1;
    }
  }
  return worst;
}

// FNV-1a
void hash(uint64_t& state, const void* data, size_t bytes) {
  for (size_t i = 0; i < bytes; ++i) {
    state = (state ^ static_cast<const uint8_t*>(data)[i]) * 0x100000001b3u;
  }
}
void hash(uint64_t& state, const Buffer& b) {
  hash(state, b.as(), b.bytes());
}
void hash(uint64_t& state, const std::vector<double>& v) {
  hash(state, v.data(), v.size() * sizeof(double));
}

int numbers() {
  const Case cases[] = {
      {"long rows", {2, 3, 3001, kFirst}, Activation::Identity, false},
      {"one channel", {1, 1, 8209, kFirst}, Activation::Hardswish, false},
      {"rows", {3, 5, 331, kFirst}, Activation::Relu, true},
      {"short rows", {7, 11, 49, kFirst}, Activation::Silu, true},
      {"short rows, no residual", {7, 11, 25, kFirst}, Activation::Relu, false},
      {"rows, no residual", {5, 7, 331, kFirst}, Activation::Relu6, false},
      {"channels last", {303, 67, 1, kFirst}, Activation::Relu, true},
      {"many channels", {5, 1100, 1, kFirst}, Activation::LeakyRelu, true},
      {"folded samples", {2003, 3, 1, kFirst}, Activation::Relu6, true},
      {"folded short rows", {501, 3, 5, kFirst}, Activation::Identity, true},
      {"tiny", {3, 5, 1, kFirst}, Activation::Silu, false},
      {"past the caches", {3, 5, 777, kFirst}, Activation::Relu, true, Data::Usual, true},
      {"outlier in rows", {2, 3, 3001, kFirst}, Activation::Identity, false, Data::Outlier},
      {"outlier in columns", {2003, 17, 1, kFirst}, Activation::Hardswish, true, Data::Outlier},
      {"huge rows", {2, 3, 1031, kFirst}, Activation::Relu, false, Data::Huge},
      {"huge columns", {103, 37, 1, kFirst}, Activation::Identity, false, Data::Huge},
  };
  int failures = 0;
  for (const DType dtype : {DType::Float, DType::Double, DType::Half, DType::BFloat16}) {
    double worst = 0;
    uint64_t state = 0xcbf29ce484222325u;
    for (const Case& c : cases) {
      if (c.data == Data::Huge && dtype == DType::Half) continue;
      const Inputs in(c, dtype);
      const Results out = results_of(c, dtype, 1, in);
      const Comparison comparison(c, dtype, in, out);
      worst = std::fmax(worst, comparison.worst());
      failures += comparison.failures();
      if (!(results_of(c, dtype, 3, in) == out)) {
        std::printf("%s: other bits with 3 threads\n", c.name);
        ++failures;
      }
      for (const Elements* e : {&out.y, &out.evaluated, &out.dx, &out.dx_constant}) {
        hash(state, *e);
      }
      for (const auto* v : {&out.mean, &out.var, &out.sum_g, &out.sum_g_xhat}) hash(state, *v);
      hash(state, out.dresidual);
      hash(state, out.mask);
    }
    if (format_of(dtype).bytes == 2) failures += wrong_conversions(dtype);
    std::printf("%-8s  worst error %.2f of what is allowed, bits %016llx\n", format_of(dtype).name,
                worst, static_cast<unsigned long long>(state));
  }
  return failures > 0 ? 1 : 0;
}

}  // namespace

int main(int count, char** arguments) try {
  const std::string what = count > 1 ? arguments[1] : "";
  if (count > 2) setenv("BNORM_EXT_CPU_CAPABILITY", arguments[2], 1);
  const std::string chosen = capability();
  if (what == "choice") return std::puts(chosen.c_str()) < 0;
  if (what == "threads") return threads();
  if (what == "numbers") return numbers();
  std::puts("what: choice, threads or numbers");
  return 1;
} catch (const std::invalid_argument& error) {
  std::puts(error.what());
  return 2;
}
