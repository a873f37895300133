// The table of functions through which the operators (forward.cpp, backward.cpp) call the kernels
// of a device, in the manner of ATen's DispatchStub. The operators check, resolve and allocate; the
// table's functions only read and write. No tensor that they are given is empty.
#pragma once

#include <ATen/ATen.h>
#include <torch/library.h>

#include "epilogue.h"
#include "tensors.h"

namespace bnorm_ext {

// What a forward pass reads and writes.
struct ForwardCall {
  Input in;  // x
  Epilogue epilogue;
  ChannelVector weight, bias;
  at::Tensor y;     // in the format of x
  at::Tensor mask;  // of `mask_bytes` bytes, or of none where no mask is wanted
};

// What a backward pass reads.
struct BackwardCall {
  Input in;       // x
  at::Tensor dy;  // in the layout of x
  Epilogue epilogue;
  ChannelVector weight, bias;
  Statistics statistics;
};

// What a backward pass writes; undefined where it is not wanted. g is the gradient of z.
struct BackwardOutputs {
  at::Tensor dx, dresidual;      // in the format of x
  at::Tensor sum_g, sum_g_xhat;  // [C], the gradients of bias and weight
};

// The functions may replace a call's inputs by aligned copies, hence no const.
struct Backend {
  // The length of the mask that a piecewise linear activation leaves. Its bit layout is
  // device-specific.
  int64_t (*mask_bytes)(const Input& in);

  // Training forward: mean [2, C] (mean_like in tensors.h) and rstd [C] of the batch, both acc, y from
  // them, running statistics and counter.
  void (*train)(ForwardCall& call, double eps, const RunningUpdate& running, const at::Tensor& mean,
                const at::Tensor& rstd);
  // y from statistics that are known.
  void (*normalise)(ForwardCall& call, const Statistics& statistics);
  // mean and biased variance of x, both [C] in double.
  void (*statistics)(Input& in, const at::Tensor& mean, const at::Tensor& var);
  // mean, var [W, C] and count [W] of W processes, contiguous, into mean [2, C] and rstd [C], acc, of
  // all of them, running statistics and counter.
  void (*merge)(const at::Tensor& mean, const at::Tensor& var, const at::Tensor& count, double eps,
                const RunningUpdate& running, const at::Tensor& merged_mean,
                const at::Tensor& merged_rstd);

  // With xhat = (x - mean) * rstd and g the gradient of z: the sums of g and g * xhat, and
  // dx = (g - mean(g) - xhat * mean(g * xhat)) * weight * rstd or, with constant_statistics,
  // dx = g * weight * rstd; dresidual = g.
  void (*backward)(BackwardCall& call, bool constant_statistics, const BackwardOutputs& out);
  // dx and dresidual alone, from means over more than this tensor, [C] acc.
  void (*backward_apply)(BackwardCall& call, const at::Tensor& mean_g,
                         const at::Tensor& mean_g_xhat, const BackwardOutputs& out);
};

namespace cpu {
const Backend& backend();
}
namespace cuda {  // where CUDA kernels are compiled in
const Backend& backend();
bool has_code();  // whether they are compiled for the current device
}  // namespace cuda

// Registers every operator for the dispatch key of `m`, on tensors of this type of device. The key
// is not always that of the device: the tests run the CUDA kernels on CPU tensors.
void register_operators(torch::Library& m, c10::DeviceType device, const Backend& backend);
void register_forward(torch::Library& m);   // those of forward.cpp
void register_backward(torch::Library& m);  // those of backward.cpp

// That of the tensor's device.
const Backend& backend_of(const at::Tensor& t);

}  // namespace bnorm_ext
