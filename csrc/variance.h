// The variance that both devices compute from sums of deviations and of their squares.
#pragma once

#include "activation.h"

namespace bnorm_ext {

// Rounding can make the difference of two sums slightly negative, where the variance is 0. NaN
// stays NaN.
BNORM_HOST_DEVICE double clamp_variance(double variance) {
  return variance < 0 ? 0 : variance;
}

}  // namespace bnorm_ext
