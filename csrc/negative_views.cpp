// Tensors that are stored with the opposite sign, such as the imaginary part of a conjugated tensor
// (Tensor.is_neg). Kernels get their values, and what is updated in place is written back with the
// sign. PyTorch does that for all operators that update one argument at most; this is for the rest.
#include <ATen/ATen.h>
#include <torch/library.h>

#include <array>
#include <tuple>
#include <type_traits>
#include <utility>

#include "memory.h"
#include "operators.h"

namespace bnorm_ext {
namespace {

at::Tensor with_its_values(const at::Tensor& t) {
  return t.resolve_neg();
}
OptionalTensor with_its_values(const OptionalTensor& t) {
  return given(t) ? OptionalTensor(t->resolve_neg()) : t;
}
template <typename T>
const T& with_its_values(const T& value) {
  return value;
}

// Calls `op`, whose first kFirst arguments are tensors that are read, and whose next ones are
// running_mean, running_var and num_batches_tracked.
template <auto op, size_t kFirst, typename Signature>
struct Resolved;
template <auto op, size_t kFirst, typename Result, typename... Arguments>
struct Resolved<op, kFirst, Result(Arguments...)> {
  static Result call(Arguments... arguments) {
    const auto all = std::tie(arguments...);
    // Not left to the call below: its tensors are copies, which never share memory.
    check_apart({or_null(std::get<kFirst>(all)), or_null(std::get<kFirst + 1>(all)),
                 or_null(std::get<kFirst + 2>(all))},
                read(all, std::make_index_sequence<kFirst>()));
    const std::tuple<std::decay_t<Arguments>...> values(with_its_values(arguments)...);
    Result out = std::apply([](const auto&... value) { return op().call(value...); }, values);
    write_back(std::get<kFirst>(all), std::get<kFirst>(values));
    write_back(std::get<kFirst + 1>(all), std::get<kFirst + 1>(values));
    write_back(std::get<kFirst + 2>(all), std::get<kFirst + 2>(values));
    return out;
  }

  template <size_t... kIndex>
  static std::array<const at::Tensor*, kFirst> read(const std::tuple<const Arguments&...>& all,
                                                    std::index_sequence<kIndex...>) {
    return {or_null(std::get<kIndex>(all))...};
  }

  static void write_back(const OptionalTensor& to, const OptionalTensor& values) {
    if (given(to) && to->is_neg()) to->copy_(*values);
  }
};

}  // namespace

TORCH_LIBRARY_IMPL(bnorm_ext, Negative, m) {
  m.impl("batch_norm_training", Resolved<training_op, 4, decltype(batch_norm_training)>::call);
  m.impl("batch_norm_merge_stats", Resolved<merge_op, 3, decltype(batch_norm_merge_stats)>::call);
}

}  // namespace bnorm_ext
