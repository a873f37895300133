// The table of contents: the operators torch.ops.bnorm_ext.* with the kernels behind them, and the
// Python module _C with the facts that are only known at run time.
//
// Shapes: x, y, dy, dx, residual (N, C, ...); weight, bias and running statistics (C,); rstd (C,) and
// mean (2, C) in the accumulation type (float for 16-bit x). mean[0] is the mean, rounded: native's
// save_mean. mean[1] is what rounding has left out. What takes mean and rstd takes mean[0] alone too.
// A tensor that was not asked for is returned undefined.
//
// y = act(z), z = (x - mean) * rstd * weight + bias + residual; act is one of identity, relu,
// relu6, leaky_relu, silu, hardswish (csrc/activation.h). Backward computes z once more from x,
// residual, statistics and parameters. After an addition, a piecewise linear act needs one bit of z
// per element only: with save_mask, forward returns these bits as `mask`, which backward then takes
// instead of residual. Without, mask is empty. Its bit layout is device-specific. dresidual is the
// gradient of z.
#include <torch/csrc/utils/pybind.h>
#include <torch/library.h>

#include <vector>

#include "backend.h"
#include "collectives.h"
#include "cpu/capability.h"
#include "explain.h"
#include "memory.h"
#include "tensors.h"

TORCH_LIBRARY(bnorm_ext, m) {
  // flexible_layout: a compiler may choose the strides of the arguments. The outputs have the format
  // of x, but for batch_norm_backward with any_layout.
  const std::vector<at::Tag> tags = {at::Tag::flexible_layout, at::Tag::pt2_compliant_tag};
  // Training forward: statistics of the batch, running statistics and counter updated in place.
  // momentum=None: the cumulative average, from num_batches_tracked.
  m.def(
      "batch_norm_training(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, "
      "Tensor(a!)? running_mean, Tensor(b!)? running_var, Tensor(c!)? num_batches_tracked, "
      "float? momentum, float eps, str act=\"identity\", float negative_slope=0.01, "
      "bool save_mask=False) -> (Tensor y, Tensor mean, Tensor rstd, Tensor mask)",
      tags);
  m.def(
      "batch_norm_inference(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, "
      "Tensor running_mean, Tensor running_var, float eps, str act=\"identity\", "
      "float negative_slope=0.01, bool save_mask=False) -> (Tensor y, Tensor mask)",
      tags);
  // train, eps and the statistics are those of native_batch_norm_backward: with train, mean and
  // rstd of the forward pass; without, running_mean, running_var and eps. The others are not read.
  // output_mask: which of dx, dresidual, dweight, dbias are wanted. any_layout: dx and dresidual
  // are channels-last where x or dy is; else in the format of x, as native's. For compiled graphs,
  // whose forward may have other strides than their backward.
  m.def(
      "batch_norm_backward(Tensor dy, Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, "
      "Tensor? running_mean, Tensor? running_var, Tensor? mean, Tensor? rstd, bool train, "
      "float eps, Tensor? mask, str act, float negative_slope, bool[4] output_mask, "
      "bool any_layout=False) "
      "-> (Tensor dx, Tensor dresidual, Tensor dweight, Tensor dbias)",
      tags);
  // The halves of the above, for statistics that are shared between processes. mean and var
  // (biased) of batch_norm_stats are double whatever x is, so that merging loses nothing.
  m.def("batch_norm_stats(Tensor x) -> (Tensor mean, Tensor var)", tags);
  // mean, var (W, C) and count (W,) of W processes, in double.
  m.def(
      "batch_norm_merge_stats(Tensor mean, Tensor var, Tensor count, Tensor(a!)? running_mean, "
      "Tensor(b!)? running_var, Tensor(c!)? num_batches_tracked, float? momentum, float eps, "
      "ScalarType dtype) -> (Tensor mean, Tensor rstd)",
      tags);
  m.def(
      "batch_norm_apply(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, Tensor mean, "
      "Tensor rstd, str act=\"identity\", float negative_slope=0.01, bool save_mask=False) "
      "-> (Tensor y, Tensor mask)",
      tags);
  m.def(
      "batch_norm_backward_reduce(Tensor dy, Tensor x, Tensor? residual, Tensor? weight, "
      "Tensor? bias, Tensor mean, Tensor rstd, Tensor? mask, str act=\"identity\", "
      "float negative_slope=0.01) -> (Tensor sum_dy, Tensor sum_dy_xhat)",
      tags);
  // mean_dy, mean_dy_xhat: the two sums over all processes, divided by the total count. dresidual
  // is defined where there was a residual, or a mask in its place.
  m.def(
      "batch_norm_backward_apply(Tensor dy, Tensor x, Tensor? residual, Tensor? weight, "
      "Tensor? bias, Tensor mean, Tensor rstd, Tensor? mask, Tensor mean_dy, Tensor mean_dy_xhat, "
      "str act=\"identity\", float negative_slope=0.01) -> (Tensor dx, Tensor dresidual)",
      tags);
}

TORCH_LIBRARY_IMPL(bnorm_ext, CPU, m) {
  bnorm_ext::register_operators(m, c10::DeviceType::CPU, bnorm_ext::cpu::backend());
}

#ifdef BNORM_EXT_CUDA
TORCH_LIBRARY_IMPL(bnorm_ext, CUDA, m) {
  bnorm_ext::register_operators(m, c10::DeviceType::CUDA, bnorm_ext::cuda::backend());
}
#endif

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.doc() = "Run-time facts of the compiled part of bnorm_ext.";
  m.def("cpu_capability", &bnorm_ext::cpu::capability,
        "The instruction set of the CPU kernels in use: baseline, avx2 or avx512.");
  m.def(
      "has_cuda",
      [] {
#ifdef BNORM_EXT_CUDA
        return true;
#else
        return false;
#endif
      },
      "Whether the CUDA kernels are compiled in.");
  m.def("lacks_memory", &bnorm_ext::lacks_memory,
        "Whether elements of the tensor lie outside of its storage.");
  m.def(
      "are_apart",
      [](const std::vector<bnorm_ext::OptionalTensor>& buffers,
         const std::vector<bnorm_ext::OptionalTensor>& read) {
        const auto pointers = [](const std::vector<bnorm_ext::OptionalTensor>& tensors) {
          std::vector<const at::Tensor*> found;
          for (const auto& t : tensors) found.push_back(bnorm_ext::or_null(t));
          return found;
        };
        return bnorm_ext::are_apart(pointers(buffers), pointers(read));
      },
      "Whether no buffer shares memory with itself, another one or something read.");
  m.def("explain_plan", &bnorm_ext::explain_plan, pybind11::arg("x"), pybind11::arg("tensors"),
        pybind11::arg("multiprocessors"), pybind11::arg("shared_per_multiprocessor"),
        pybind11::arg("shared_per_block"), pybind11::arg("l2_bytes"),
        pybind11::arg("gigabytes_per_second"), pybind11::arg("clock_mhz"),
        pybind11::arg("clusters"), pybind11::arg("aligned"), pybind11::arg("beside_collectives"),
        "The launch plan of x on a GPU of these limits.");
  m.def(
      "set_beside_collectives", [](bool beside) { bnorm_ext::beside_collectives = beside; },
      "Whether kernels of collectives may run at the same time, from now on.");
#ifdef BNORM_EXT_CUDA
  m.def("has_code", &bnorm_ext::cuda::has_code,
        "Whether the CUDA kernels are compiled for the current GPU.");
#endif
}
