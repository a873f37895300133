// How evenly csrc/cpu divides the work of a call among threads: runs parallel.h with kernels that
// count elements.
//
// Reads lines "N C S layout element_bytes" from stdin, layout being 0 (channels first) or 1
// (channels last). For each, for 1 to 64 threads and each pass of each call, prints
//   pass threads busiest narrow
// with `busiest`, the elements of the thread that has most, over those of each if all had the same,
// where no more threads take part than there are grains of work; and `narrow`, the share of the
// elements that are taken in parts of less than three quarters of the channels. Fails if a pass does
// not cover each channel of each sample once.
#include <cpu/parallel.h>

#include <cstdio>
#include <cstdlib>

using namespace bnorm_ext;
using namespace bnorm_ext::cpu;

namespace bnorm_ext {
namespace cpu {
const KernelTable& kernels() {
  static const KernelTable table = [] {
    KernelTable t{};
    t.fence = [] {};
    return t;
  }();
  return table;
}
}  // namespace cpu
}  // namespace bnorm_ext

namespace {

// Elements by thread.
class Count {
 public:
  explicit Count(const Shape& shape) : shape_(shape) {}

  void add(const Span& span, int64_t c0, int64_t c1) {
    elements_[at::thread] += span.count() * (c1 - c0);
    if ((c1 - c0) * 4 < shape_.C * 3) narrow_ += span.count() * (c1 - c0);
    // A sum that tells places apart, for each channel and position weighed on its own.
    places_ += (span.n0 + span.n1 - 1) * (span.n1 - span.n0) * (span.s1 - span.s0) * (c1 - c0);
    places_ += (c0 + c1 - 1) * (c1 - c0) * span.count() * 3;
    places_ += (span.s0 + span.s1 - 1) * span.count() * (c1 - c0) * 7;
  }

  void print(const char* pass) const {
    const int64_t N = shape_.N, C = shape_.C, S = shape_.S, all = shape_.numel();
    int64_t total = 0, most = 0;
    for (const int64_t n : elements_) total += n, most = max(most, n);
    if (total != all || places_ != ((N - 1) + (C - 1) * 3 + (S - 1) * 7) * all) {
      std::printf("%s does not cover the tensor with %ld threads\n", pass,
                  static_cast<long>(at::threads));
      std::exit(1);
    }
    const int64_t wanted = clamp(all / kGrain, 1, at::threads);
    std::printf("%s %ld %.4f %.4f\n", pass, static_cast<long>(at::threads),
                static_cast<double>(most * wanted) / static_cast<double>(all),
                static_cast<double>(narrow_) / static_cast<double>(all));
  }

 private:
  Shape shape_;
  int64_t elements_[64] = {};
  int64_t narrow_ = 0;
  int64_t places_ = 0;
};

struct Nothing {};
struct NoTotal {
  void add(const Nothing&, double) {}
};

void training(const char* first_pass, const char* second_pass, const Shape& shape, int64_t bytes,
              int64_t inputs, int64_t tensors, bool writes_mask) {
  const bool nontemporal = is_nontemporal(shape, bytes, tensors);
  const int64_t block =
      cache_block_channels(shape, bytes * inputs, nontemporal, at::threads, writes_mask);
  Count first(shape), second(shape);
  two_passes<Nothing, NoTotal>(
      shape, block, writes_mask,
      [&](const Span& span, int64_t c0, int64_t c1, Nothing*) { first.add(span, c0, c1); },
      [](int64_t, const NoTotal&) {},
      [&](const Span& span, int64_t c0, int64_t c1) { second.add(span, c0, c1); }, true);
  first.print(first_pass);
  second.print(second_pass);
}

void evaluation(const char* pass, const Shape& shape, bool writes_mask) {
  Count only(shape);
  one_pass(shape, writes_mask,
           [&](const Span& span, int64_t c0, int64_t c1) { only.add(span, c0, c1); });
  only.print(pass);
}

}  // namespace

int main() {
  long N, C, S, last, bytes;
  while (std::scanf("%ld %ld %ld %ld %ld", &N, &C, &S, &last, &bytes) == 5) {
    const Shape given{N, C, S, last != 0 ? Layout::ChannelsLast : Layout::ChannelsFirst};
    const Shape shape = as_channels_first(given);
    std::printf("# %ld %ld %ld %ld %ld\n", N, C, S, last, bytes);
    for (at::threads = 1; at::threads <= 64; ++at::threads) {
      training("moments", "normalise", shape, bytes, 1, 2, false);
      training("moments_before_mask", "normalise_with_mask", shape, bytes, 1, 3, true);
      training("sums", "dx", shape, bytes, 2, 3, false);
      evaluation("inference", shape, false);
      evaluation("inference_with_mask", shape, true);
    }
  }
}
