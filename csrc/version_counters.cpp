// Version counters of the buffers that are changed in place, on the ADInplaceOrView key: an
// operator written in C++ does not increment them by itself, and autograd would miss the change.
#include <ATen/ATen.h>
#include <torch/csrc/autograd/VariableTypeUtils.h>
#include <torch/library.h>

#include <tuple>

#include "operators.h"

namespace bnorm_ext {
namespace {

// Calls `op`, whose arguments from number kFirst on are running_mean, running_var and
// num_batches_tracked.
template <auto op, size_t kFirst, typename Signature>
struct InPlace;
template <auto op, size_t kFirst, typename Result, typename... Arguments>
struct InPlace<op, kFirst, Result(Arguments...)> {
  static Result call(Arguments... arguments) {
    const auto all = std::tie(arguments...);
    const OptionalTensor& running_mean = std::get<kFirst>(all);
    const OptionalTensor& running_var = std::get<kFirst + 1>(all);
    const OptionalTensor& num_batches_tracked = std::get<kFirst + 2>(all);
    // Native's addition refuses such a counter, in these words.
    if (given(num_batches_tracked) && num_batches_tracked->is_inference()) {
      torch::autograd::increment_version(*num_batches_tracked);
    }
    Result out;
    {
      at::AutoDispatchBelowADInplaceOrView guard;
      out = op().call(arguments...);
    }
    for (const OptionalTensor* t : {&running_mean, &running_var, &num_batches_tracked}) {
      // Inference tensors have no version; native changes them all the same.
      if (given(*t) && !(*t)->is_inference()) torch::autograd::increment_version(**t);
    }
    return out;
  }
};

}  // namespace

TORCH_LIBRARY_IMPL(bnorm_ext, ADInplaceOrView, m) {
  m.impl("batch_norm_training", InPlace<training_op, 4, decltype(batch_norm_training)>::call);
  m.impl("batch_norm_merge_stats", InPlace<merge_op, 3, decltype(batch_norm_merge_stats)>::call);
}

}  // namespace bnorm_ext
