// Mean and variance that both devices compute from sums of deviations and of their squares.
#pragma once

#include "activation.h"

namespace bnorm_ext {

// Rounding can make the difference of two sums slightly negative, where the variance is 0. NaN
// stays NaN.
BNORM_HOST_DEVICE double clamp_variance(double variance) {
  return variance < 0 ? 0 : variance;
}

// A mean in the accumulation type, and what rounding it has left out, which is added to it once per
// channel (less_rest in params.h).
template <typename A>
struct SplitMean {
  A mean, rest;
};
// That of anchor + delta. The sum is exact: its own rounding goes into the rest too (Knuth's TwoSum).
template <typename A>
BNORM_HOST_DEVICE SplitMean<A> split_mean(double anchor, double delta) {
  const double sum = anchor + delta, part = sum - anchor;
  const double lost = (anchor - (sum - part)) + (delta - part);
  const A mean = static_cast<A>(sum);
  const double rest = (sum - mean) + lost;
  return {mean, rest - rest == 0 ? static_cast<A>(rest) : A{0}};  // 0 where the mean is not finite
}

}  // namespace bnorm_ext
