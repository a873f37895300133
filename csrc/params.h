// The structs that both devices' kernels receive from the files that call torch; cpu/params.h and
// cuda/params.h hold those of one device. Free of torch headers, like the kernels.
//
// A tensor of any rank from 2 is viewed as [N, C, S]: N samples, C channels, S positions.
// "acc" is the accumulation type: double for double data, float for float, half and bfloat16.
#pragma once

#include <cstdint>

#include "activation.h"

namespace bnorm_ext {

enum class DType : int8_t { Float, Double, Half, BFloat16 };

// The accumulation type of data of type T, in which everything is computed.
template <typename T>
struct AccOf {
  using type = float;
};
template <>
struct AccOf<double> {
  using type = double;
};
template <typename T>
using Acc = typename AccOf<T>::type;

enum class Layout : int8_t {
  ChannelsFirst,  // element (n, c, s) at (n * C + c) * S + s
  ChannelsLast,   // element (n, c, s) at (n * S + s) * C + c; N * S rows of C channels
};

struct Shape {
  int64_t N = 0;
  int64_t C = 0;
  int64_t S = 0;
  Layout layout = Layout::ChannelsFirst;

  constexpr int64_t count() const { return N * S; }  // values per channel
  constexpr int64_t numel() const { return N * C * S; }
};

// One value per channel in a tensor of the caller, read and written in place with its own dtype and
// stride. data == nullptr: the argument was not given.
struct ChannelVector {
  void* data = nullptr;  // [C], element c at c * stride
  int64_t stride = 1;    // in elements
  DType dtype = DType::Float;
};

// Known statistics, in the dtype that they are stored in.
struct Statistics {
  ChannelVector mean;  // [C]
  ChannelVector var;   // [C] the variance, or rstd where is_rstd
  bool is_rstd = false;
  double eps = 0;
  ChannelVector rest = {};  // [C] what rounding the mean has left out of it, or none
};

// The running statistics, and how a training step updates them.
struct RunningUpdate {
  ChannelVector mean;                      // [C], updated in place
  ChannelVector var;                       // [C], updated in place with the unbiased variance
  int64_t* num_batches_tracked = nullptr;  // scalar, incremented by one
  double momentum = 0.1;                   // weight of the new batch
  bool cumulative = false;                 // momentum is 1 / (num_batches_tracked + 1)
};

// value - rest * factor, where `value` was computed with the rounded mean and `rest` is what rounding
// it has left out: kernels subtract the rounded mean from every x, and the rest is accounted for once
// per channel. An infinite weight or gradient leaves the value as it is.
BNORM_HOST_DEVICE double less_rest(double value, double rest, double factor) {
  const double more = rest * factor;
  return more - more == 0 ? value - more : value;
}

// The constant term of z = fma(x - mean, scale, shift). Forward and backward compute it from the same
// numbers by this function: they must find z on the same side of an activation's kink.
template <typename A>
BNORM_HOST_DEVICE A shift_of(double bias, A rest, A scale) {
  return static_cast<A>(less_rest(bias, rest, scale));
}

}  // namespace bnorm_ext
