#include "semaphores.h"

#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAFunctions.h>
#include <c10/cuda/CUDAGraphsC10Utils.h>
#include <c10/cuda/CUDAStream.h>

#include <map>
#include <mutex>
#include <utility>
#include <vector>

#include "kernels.h"
#include "per_device.h"
#include "ranges.h"

namespace bnorm_ext {
namespace cuda {
namespace {

// Of a stream at this moment. id is 0 where it is not capturing, and else the capture's, which CUDA
// does not use again.
struct Capture {
  unsigned long long id = 0;
  cudaGraph_t graph = nullptr;
};

Capture capture_of(cudaStream_t stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  Capture capture;
#if defined(CUDART_VERSION) && CUDART_VERSION < 13000
  C10_CUDA_CHECK(cudaStreamGetCaptureInfo_v2(stream, &status, &capture.id, &capture.graph));
#else
  C10_CUDA_CHECK(cudaStreamGetCaptureInfo(stream, &status, &capture.id, &capture.graph));
#endif
  return status == cudaStreamCaptureStatusActive ? capture : Capture{};
}

// Not the handle, which a later stream may have again while this one's launches still run, and
// which the threads' default streams have in common. A stream that captures is not destroyed.
uint64_t identity_of(cudaStream_t stream, const Capture& capture) {
  unsigned long long id = reinterpret_cast<uintptr_t>(stream);
  if (capture.id == 0) C10_CUDA_CHECK(cudaStreamGetId(stream, &id));
  return id;
}

// The two arrays of one device, and who has which words of them. No CUDA function is called with
// the lock held: CUDA's own thread takes it to give words back.
class DeviceWords {
 public:
  DeviceWords(unsigned* semaphores, unsigned* phases)
      : arrays_{{semaphores, FreeRanges(kSemaphoreWords)}, {phases, FreeRanges(kPhaseWords)}} {}

  // Null where not so many words are free. *is_new: whether the capture had no words before.
  unsigned* of(uint64_t capture, uint64_t stream, SemaphoreUse use, int64_t count, bool* is_new) {
    constexpr int64_t kLeast = 256;
    *is_new = false;
    const std::lock_guard<std::mutex> lock(mutex_);
    Array& array = arrays_[static_cast<int>(use)];
    const auto known = array.of_owner.find({capture, stream});
    const Range before = known != array.of_owner.end() ? known->second : Range{};
    if (before.count >= count) return array.begin + before.begin;
    int64_t longer = before.count == 0 ? kLeast : 2 * before.count;
    while (longer < count) longer *= 2;
    const Range range = array.free.take(longer);
    if (range.count == 0) return nullptr;
    array.of_owner[{capture, stream}] = range;
    if (capture != 0) {
      *is_new = captured_.count(capture) == 0;
      captured_[capture].push_back({use, range});
    }
    return array.begin + range.begin;
  }

  void release(uint64_t capture) {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (const auto& [use, range] : captured_[capture]) {
      arrays_[static_cast<int>(use)].free.give_back(range);
    }
    captured_.erase(capture);
    for (Array& array : arrays_) {
      auto& owners = array.of_owner;
      owners.erase(owners.lower_bound({capture, 0}), owners.upper_bound({capture, UINT64_MAX}));
    }
  }

 private:
  struct Array {
    unsigned* begin;
    FreeRanges free;
    std::map<std::pair<uint64_t, uint64_t>, Range> of_owner;  // by capture, or 0, and stream
    Array(unsigned* begin_, FreeRanges free_) : begin(begin_), free(std::move(free_)) {}
  };
  std::mutex mutex_;
  Array arrays_[2];
  std::map<uint64_t, std::vector<std::pair<SemaphoreUse, Range>>> captured_;
};

std::unique_ptr<DeviceWords> find_words() {
  // To find the arrays may load this file's code, which a capture in progress would forbid.
  const c10::cuda::CUDAStreamCaptureModeGuard relaxed(cudaStreamCaptureModeRelaxed);
  unsigned *semaphores = nullptr, *phases = nullptr;
  C10_CUDA_CHECK(find_semaphore_words(&semaphores));
  C10_CUDA_CHECK(find_phase_words(&phases));
  return std::make_unique<DeviceWords>(semaphores, phases);
}

// A capture that has words, told when its graph is gone.
struct Holder {
  DeviceWords* words;
  uint64_t capture;

  static void CUDART_CB release(void* holder) {
    const std::unique_ptr<Holder> gone(static_cast<Holder*>(holder));
    gone->words->release(gone->capture);
  }
};

// Where CUDA refuses, nobody hears of the graph's end, and its words stay reserved.
void release_with(cudaGraph_t graph, DeviceWords* words, uint64_t capture) {
  cudaUserObject_t object = nullptr;
  auto holder = std::make_unique<Holder>(Holder{words, capture});
  cudaError_t error = cudaUserObjectCreate(&object, holder.get(), Holder::release, /*refcount=*/1,
                                           cudaUserObjectNoDestructorSync);
  if (error == cudaSuccess) {
    holder.release();
    error = cudaGraphRetainUserObject(graph, object, /*count=*/1, cudaGraphUserObjectMove);
  }
  if (error != cudaSuccess) cudaGetLastError();  // not the next caller's
}

}  // namespace

SemaphoreMemory::SemaphoreMemory(int64_t count, const at::TensorOptions& options,
                                 SemaphoreUse use) {
  static PerDevice<DeviceWords> of_device;
  DeviceWords& words = of_device.get(c10::cuda::current_device(), find_words);
  const cudaStream_t stream = c10::cuda::getCurrentCUDAStream();
  const Capture capture = capture_of(stream);
  bool is_new = false;
  words_ = words.of(capture.id, identity_of(stream, capture), use, count, &is_new);
  if (is_new) release_with(capture.graph, &words, capture.id);
  if (words_ != nullptr) return;
  own_ = at::zeros({count}, options.dtype(at::kInt));
  words_ = reinterpret_cast<unsigned*>(own_.data_ptr<int32_t>());
}

}  // namespace cuda
}  // namespace bnorm_ext
