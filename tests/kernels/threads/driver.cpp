// csrc/cpu/parallel.h and the CPU kernels on plain threads, without torch: what csrc/cpu/backend.cpp
// does for a training step, an evaluation and a backward pass, over shapes that take every way of
// dividing the work. Under ThreadSanitizer a race ends the program. It also compares the bits with
// those of one thread.
//
//   driver ISA     exit code 0: equal; 1: not; 2: this CPU does not have the instruction set
#include <cpu/parallel.h>

#include <cmath>
#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

using namespace bnorm_ext;
using namespace bnorm_ext::cpu;

namespace bnorm_ext {
namespace cpu {
namespace {
const KernelTable* chosen = &kernels_baseline;
}
const KernelTable& kernels() {
  return *chosen;
}
}  // namespace cpu
}  // namespace bnorm_ext

namespace {

bool choose(const std::string& isa) {
  if (isa == "baseline") return true;
#ifdef BNORM_EXT_X86_KERNELS
  if (isa == "avx2" && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
      __builtin_cpu_supports("f16c")) {
    chosen = &kernels_avx2;
    return true;
  }
  if (isa == "avx512" && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    chosen = &kernels_avx512;
    return true;
  }
#endif
  return false;
}

constexpr size_t kAlign = 64;

// Bytes that begin where torch's tensors do.
class Buffer {
 public:
  explicit Buffer(size_t bytes)
      : bytes_(bytes),
        data_(std::aligned_alloc(kAlign, (bytes + kAlign) / kAlign * kAlign), std::free) {
    std::memset(data_.get(), 0, bytes);
  }
  template <typename T = void>
  T* as() const {
    return static_cast<T*>(data_.get());
  }
  bool operator==(const Buffer& other) const {
    return bytes_ == other.bytes_ && std::memcmp(as(), other.as(), bytes_) == 0;
  }

 private:
  size_t bytes_;
  std::unique_ptr<void, decltype(&std::free)> data_;
};

struct Case {
  const char* name;
  Shape shape;
  Activation act;
  bool residual;
};

// The results of all passes over one tensor of float.
struct Results {
  explicit Results(const Case& c)
      : y(bytes(c.shape)),
        evaluated(bytes(c.shape)),
        dx(bytes(c.shape)),
        dresidual(bytes(c.shape)),
        mask(static_cast<size_t>(MaskRows(c.shape).bytes())),
        sums(static_cast<size_t>(c.shape.C) * 2 * sizeof(float)) {}
  static size_t bytes(const Shape& s) { return static_cast<size_t>(s.numel()) * sizeof(float); }
  bool operator==(const Results& o) const {
    return y == o.y && evaluated == o.evaluated && dx == o.dx && dresidual == o.dresidual &&
           mask == o.mask && sums == o.sums;
  }
  Buffer y, evaluated, dx, dresidual, mask, sums;
};

struct Total {  // of chunks, in index order
  void add(const Moments& m, double n) {
    count += n;
    mean += n * (m.anchor + m.delta);
    m2 += m.m2;
  }
  void add(const Sums& s, double) {
    mean += s.dy;
    m2 += s.dy_xhat;
  }
  double count = 0, mean = 0, m2 = 0;
};

void fill(float* values, int64_t count, unsigned seed) {
  unsigned state = seed * 2654435761u + 1;
  for (int64_t i = 0; i < count; ++i) {
    state = state * 1664525u + 1013904223u;
    values[i] = static_cast<float>(state >> 8) / (1 << 23) - 0.7f;
  }
}

void run(const Case& c, int threads, Results* out) {
  at::number_of_threads = threads;
  const Shape& s = c.shape;
  const int64_t C = s.C;
  Buffer x(Results::bytes(s)), dy(Results::bytes(s)), residual(Results::bytes(s));
  fill(x.as<float>(), s.numel(), 1);
  fill(dy.as<float>(), s.numel(), 2);
  fill(residual.as<float>(), s.numel(), 3);
  std::vector<float> mean(C), rstd(C), scale(C), shift(C), g_mean(C), g_xhat_mean(C);
  const bool masked = c.residual && is_piecewise(c.act);
  const double count = static_cast<double>(s.count());

  ForwardParams f;
  f.shape = s;
  f.x = x.as();
  f.y = out->y.as();
  f.mean = mean.data();
  f.scale = scale.data();
  f.shift = shift.data();
  f.residual = c.residual ? residual.as() : nullptr;
  f.act = c.act;
  f.slope = 0.1;
  f.mask = masked ? out->mask.as<uint8_t>() : nullptr;
  f.nontemporal = is_nontemporal(s, sizeof(float), c.residual ? 3 : 2);
  int64_t block = cache_block_channels(s, sizeof(float), f.nontemporal, threads, masked);
  f.prefetch_distance = prefetch_distance(s, block);
  const KernelTable& k = kernels();
  two_passes<Moments, Total>(
      s, block, /*writes_mask=*/f.mask != nullptr,
      [&](const Span& span, int64_t c0, int64_t c1, Moments* m) {
        k.moments[0](f, span, c0, c1, m);
      },
      [&](int64_t i, const Total& total) {
        mean[i] = static_cast<float>(total.mean / total.count);
        rstd[i] = static_cast<float>(1 / std::sqrt(total.m2 / total.count + 1e-5));
        scale[i] = rstd[i] * 1.5f;
        shift[i] = 0.25f;
      },
      [&](const Span& span, int64_t c0, int64_t c1) { k.apply[0](f, span, c0, c1); }, true);

  f.y = out->evaluated.as();
  f.mask = nullptr;
  one_pass(s, /*writes_mask=*/false,
           [&](const Span& span, int64_t c0, int64_t c1) { k.apply[0](f, span, c0, c1); });

  BackwardParams b;
  b.shape = s;
  b.dy = dy.as();
  b.x = x.as();
  b.dx = out->dx.as();
  b.dresidual = c.residual ? out->dresidual.as() : nullptr;
  b.mean = mean.data();
  b.rstd = rstd.data();
  b.mean_dy = g_mean.data();
  b.mean_dy_xhat = g_xhat_mean.data();
  b.scale = scale.data();
  b.shift = c.act == Activation::Identity ? nullptr : shift.data();
  b.residual = c.residual && !masked ? residual.as() : nullptr;
  b.act = c.act;
  b.slope = 0.1;
  b.mask = masked ? out->mask.as<uint8_t>() : nullptr;
  b.nontemporal = is_nontemporal(s, sizeof(float), c.residual ? 4 : 3);
  block = cache_block_channels(s, 2 * sizeof(float), b.nontemporal, threads);
  b.prefetch_distance = prefetch_distance(s, block);
  float* sums = out->sums.as<float>();
  two_passes<Sums, Total>(
      s, block, /*writes_mask=*/false,
      [&](const Span& span, int64_t c0, int64_t c1, Sums* p) { k.sums[0](b, span, c0, c1, p); },
      [&](int64_t i, const Total& total) {
        sums[2 * i] = static_cast<float>(total.mean);
        sums[2 * i + 1] = static_cast<float>(total.m2);
        g_mean[i] = static_cast<float>(total.mean / count);
        g_xhat_mean[i] = static_cast<float>(total.m2 / count);
      },
      [&](const Span& span, int64_t c0, int64_t c1) { k.dx[0](b, span, c0, c1); }, true);
}

}  // namespace

int main(int, char** arguments) {
  if (arguments[1] == nullptr || !choose(arguments[1])) return 2;
  constexpr auto kFirst = Layout::ChannelsFirst;
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
    Results one(c);
    run(c, 1, &one);
    for (const int threads : {2, 5}) {
      Results several(c);
      run(c, threads, &several);
      if (several == one) continue;
      std::printf("%s: other bits with %d threads\n", c.name, threads);
      worst = 1;
    }
  }
  return worst;
}
