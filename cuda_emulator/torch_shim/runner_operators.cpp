// The operators with the CUDA kernels behind them, on CPU tensors: registered for a dispatch key of
// their own, beside the installed ones. This library has its own copy of csrc/backend.cpp, hence
// its own table of backends.
#include <backend.h>

TORCH_LIBRARY_IMPL(bnorm_ext, PrivateUse1, m) {
  bnorm_ext::register_operators(m, c10::DeviceType::CPU, bnorm_ext::cuda::backend());
}
