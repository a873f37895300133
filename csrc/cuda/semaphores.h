// The counters that elect the last block of a reducing kernel, and those of the teams' barriers.
//
// Where they are. In two arrays of the device that belong to the compiled code
// (semaphore_words.cu), not to an allocator: no memory pool of a CUDA graph ever holds one, and
// nothing is allocated, filled or freed at run time, which a capture in progress would forbid or
// record. The arrays are zero when the code is loaded; every kernel leaves its semaphores at zero,
// so nobody has to clear them.
//
// Who has which. Launches that may run at the same time never share words. What is ordered shares:
//   - the launches of a stream have one range of words, whatever allocator torch uses at that
//     moment (the warm-up of torch's graph trees allocates from a graph's pool without capturing);
//   - the launches that one capture records from one stream have another one, which belongs to the
//     graph. A graph does not run beside itself. So two graphs may be replayed at once on two
//     streams, and a graph beside calls of the stream on which it was captured.
// A launch that needs more words than the range has gets a larger range. The old one stays
// reserved, since launches that are running or captured still use it; each range is at least twice
// as long as the one before, so that this costs no more than the last one.
//
// For how long. A stream's range for ever: torch has a fixed set of streams. (A program that makes
// streams of its own again and again uses up 1 KB and more with each.) A graph's ranges until the
// graph, what was instantiated from it, and replays in progress are gone: CUDA then releases the
// user object that the graph holds. Where all words are in use, a call allocates its own, and fills
// them: correct, at the price of one more small launch or node of the graph.
//
// At exit nothing is freed: the arrays go with the CUDA context, and the host's tables are never
// destroyed, because CUDA may release a graph late.
#pragma once

#include <ATen/ATen.h>

#include <cstdint>

namespace bnorm_ext {
namespace cuda {

// Semaphores are zero between launches; phases keep what the last barrier left.
enum class SemaphoreUse { Semaphores, Phases };

// At least `count` words for the next launch on the current stream of the current device.
class SemaphoreMemory {
 public:
  SemaphoreMemory() = default;
  SemaphoreMemory(int64_t count, const at::TensorOptions& options,
                  SemaphoreUse use = SemaphoreUse::Semaphores);
  unsigned* words() const { return words_; }

 private:
  unsigned* words_ = nullptr;
  at::Tensor own_;  // [count], where the device's are all in use
};

}  // namespace cuda
}  // namespace bnorm_ext
