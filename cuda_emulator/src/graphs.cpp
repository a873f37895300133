// Captures and the user objects of graphs. A captured launch runs at once, and a graph cannot be
// replayed: what there is serves to test what host code does while a stream captures.
#include <map>
#include <memory>
#include <vector>

#include "emulator/harness.h"
#include "settings.h"

struct CUuserObject_st {
  void* pointer;
  cudaHostFn_t destroy;
  unsigned references;
};

struct CUgraph_st {
  unsigned long long id;  // of the capture
  std::vector<CUuserObject_st*> objects;
};

namespace emulator {
namespace detail {
namespace {

std::map<cudaStream_t, cudaGraph_t>& captures() {
  static std::map<cudaStream_t, cudaGraph_t> all;
  return all;
}

}  // namespace

// Ends them; their graphs are destroyed.
void forget_captures() {
  while (!captures().empty()) {
    cudaGraph_t graph = nullptr;
    cudaStreamEndCapture(captures().begin()->first, &graph);
    cudaGraphDestroy(graph);
  }
}

}  // namespace detail

void capture_also(cudaStream_t stream, cudaStream_t other) {
  detail::captures()[other] = detail::captures().at(stream);
}

}  // namespace emulator

cudaError_t cudaStreamGetId(cudaStream_t stream, unsigned long long* id) {
  *id = reinterpret_cast<std::uintptr_t>(stream);
  return cudaSuccess;
}

cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode) {
  static unsigned long long last = 0;
  auto& captures = emulator::detail::captures();
  if (captures.count(stream) != 0) return cudaErrorInvalidValue;
  captures[stream] = new CUgraph_st{++last, {}};
  return cudaSuccess;
}

cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* graph) {
  auto& captures = emulator::detail::captures();
  const auto found = captures.find(stream);
  if (found == captures.end()) return cudaErrorInvalidValue;
  *graph = found->second;
  for (auto it = captures.begin(); it != captures.end();) {
    it = it->second == *graph ? captures.erase(it) : std::next(it);
  }
  return cudaSuccess;
}

cudaError_t cudaStreamGetCaptureInfo(cudaStream_t stream, cudaStreamCaptureStatus* status,
                                     unsigned long long* id, cudaGraph_t* graph) {
  const auto& captures = emulator::detail::captures();
  const auto found = captures.find(stream);
  const bool capturing = found != captures.end();
  *status = capturing ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  if (capturing && id != nullptr) *id = found->second->id;
  if (capturing && graph != nullptr) *graph = found->second;
  return cudaSuccess;
}

// The destructors run here; in CUDA a thread of its own runs them, some time later.
cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
  const std::unique_ptr<CUgraph_st> gone(graph);
  for (CUuserObject_st* object : gone->objects) {
    if (--object->references != 0) continue;
    object->destroy(object->pointer);
    delete object;
  }
  return cudaSuccess;
}

cudaError_t cudaUserObjectCreate(cudaUserObject_t* object, void* pointer, cudaHostFn_t destroy,
                                 unsigned references, unsigned flags) {
  if (flags != cudaUserObjectNoDestructorSync || references == 0) return cudaErrorInvalidValue;
  *object = new CUuserObject_st{pointer, destroy, references};
  return cudaSuccess;
}

cudaError_t cudaGraphRetainUserObject(cudaGraph_t graph, cudaUserObject_t object, unsigned count,
                                      unsigned flags) {
  if (graph == nullptr || object == nullptr || count == 0) return cudaErrorInvalidValue;
  if (flags != cudaGraphUserObjectMove) object->references += count;
  graph->objects.insert(graph->objects.end(), count, object);
  return cudaSuccess;
}
