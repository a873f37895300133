#include "double_backward.h"

#include <vector>

namespace bnorm_ext {

using at::Tensor;

// With xhat = (x - mean) * rstd and P(v) = v - mean(v) - xhat * mean(v * xhat), means over all but
// the channels, batch_norm_backward computes
//   dx = weight * rstd * P(dy),   dweight = sum(dy * xhat),   dbias = sum(dy)
// and, because P is symmetric and d xhat = rstd * P(d x), the gradients of
//   <ddx, dx> + <ddweight, dweight> + <ddbias, dbias>
// are those below. In inference the statistics are constants: P(v) = v and d xhat = rstd * d x.
// mean and rstd are made functions of x again, with the values they have, so that derivatives of
// any order are right.
std::tuple<Tensor, Tensor, Tensor> double_backward(
    const OptionalTensor& ddx, const OptionalTensor& ddweight, const OptionalTensor& ddbias,
    const Tensor& dy_in, const Tensor& x_in, const OptionalTensor& weight, const Tensor& mean_in,
    const Tensor& rstd_in, bool training, std::array<bool, 3> output_mask) {
  if (!given(ddx) && !given(ddweight) && !given(ddbias)) return {};
  const at::ScalarType type = accumulation_type(x_in.scalar_type());
  std::vector<int64_t> dims = {0};
  for (int64_t d = 2; d < x_in.dim(); ++d) dims.push_back(d);
  std::vector<c10::SymInt> per_channel(static_cast<size_t>(x_in.dim()), 1);
  per_channel[1] = x_in.sym_size(1);
  const auto broadcast = [&](const Tensor& t) { return t.to(type).reshape_symint(per_channel); };
  const auto average = [&](const Tensor& t) { return t.mean(dims, /*keepdim=*/true); };

  const Tensor x = x_in.to(type), dy = dy_in.to(type);
  Tensor mean = broadcast(mean_in), rstd = broadcast(rstd_in);
  if (training) {
    const Tensor mean_of_x = average(x);
    mean = mean.detach() + (mean_of_x - mean_of_x.detach());
    const Tensor var_of_x = average((x - mean).square());
    rstd = (rstd.detach().pow(-2) + (var_of_x - var_of_x.detach())).rsqrt();
  }
  const Tensor xhat = (x - mean) * rstd;
  const auto project = [&](const Tensor& v) {
    return training ? v - average(v) - xhat * average(v * xhat) : v;
  };
  const Tensor scale = given(weight) ? broadcast(*weight) * rstd : rstd;
  const Tensor p_dy = project(dy);

  Tensor g_dy, g_x, g_weight;
  const auto add = [](Tensor& sum, const Tensor& term) { sum = sum.defined() ? sum + term : term; };
  if (given(ddx)) {
    const Tensor a = ddx->to(type);
    if (output_mask[0]) add(g_dy, scale * project(a));
    if (output_mask[1] && training) {
      const Tensor terms =
          xhat * average(a * p_dy) + project(a) * average(dy * xhat) + p_dy * average(a * xhat);
      add(g_x, -(scale * rstd) * terms);
    }
    if (output_mask[2]) g_weight = (a * rstd * p_dy).sum(dims);
  }
  if (given(ddweight)) {
    const Tensor b = broadcast(*ddweight);
    if (output_mask[0]) add(g_dy, b * xhat);
    if (output_mask[1]) add(g_x, b * rstd * p_dy);
  }
  if (given(ddbias) && output_mask[0]) add(g_dy, broadcast(*ddbias).expand_as(dy));
  if (g_dy.defined()) g_dy = g_dy.to(dy_in.scalar_type());
  if (g_x.defined()) g_x = g_x.to(x_in.scalar_type());
  if (g_weight.defined() && given(weight)) g_weight = g_weight.to(weight->scalar_type());
  return {g_dy, g_x, g_weight};
}

}  // namespace bnorm_ext
