#include "backend.h"

namespace bnorm_ext {
namespace {

// By device type; filled while the library is loaded.
const Backend* backends[c10::COMPILE_TIME_MAX_DEVICE_TYPES] = {};

}  // namespace

void register_operators(torch::Library& m, c10::DeviceType device, const Backend& backend) {
  backends[static_cast<int>(device)] = &backend;
  register_forward(m);
  register_backward(m);
}

const Backend& backend_of(const at::Tensor& t) {
  const Backend* backend = backends[static_cast<int>(t.device().type())];
  TORCH_CHECK_NOT_IMPLEMENTED(backend != nullptr, "bnorm_ext: no kernels for tensors on ",
                              t.device());
  return *backend;
}

}  // namespace bnorm_ext
