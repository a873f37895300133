// The structs that cross from the torch-facing files to the kernels of either device.
// No torch header here: the kernels stay free of torch.
//
// A tensor of rank 2 to 5 and more is seen as [N, C, S]: N samples, C channels, S positions.
// "acc" is the accumulation type: double for double data, float for float, half and bfloat16.
#pragma once

#include <cstdint>

#include "activation.h"

namespace bnorm_ext {

enum class DType : int8_t { Float, Double, Half, BFloat16 };

// What values of type T are accumulated and computed in: the "acc" of the comments here.
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

// One value per channel in a tensor of the caller's, read and written in place whatever its dtype
// and stride. data == nullptr: the argument was not given.
struct ChannelVector {
  void* data = nullptr;  // [C], element c at c * stride
  int64_t stride = 1;    // in elements
  DType dtype = DType::Float;
};

// Statistics that are known, in whichever dtype they are kept.
struct Statistics {
  ChannelVector mean;  // [C]
  ChannelVector var;   // [C] the variance, or rstd where is_rstd
  bool is_rstd = false;
  double eps = 0;
};

// How a training step moves the running statistics.
struct RunningUpdate {
  ChannelVector mean;                      // [C], updated in place
  ChannelVector var;                       // [C], updated in place with the unbiased variance
  int64_t* num_batches_tracked = nullptr;  // scalar, incremented by one
  double momentum = 0.1;                   // weight of the new batch
  bool cumulative = false;                 // 1 / (num_batches_tracked + 1) in its place
};

// The constant term of z = fma(x - mean, scale, shift): the bias, and what rounding the mean to the
// accumulation type has left out of it, `rest`. That must be 0 where backward makes z again from
// the rounded mean, since both have to see the same side of a kink.
BNORM_HOST_DEVICE double shift_of(double bias, double rest, double scale) {
  const double more = rest * scale;
  return more - more == 0 ? bias - more : bias;  // an infinite weight leaves y infinite
}

struct ForwardParams {
  Shape shape;
  DType dtype = DType::Float;   // of x, y and residual
  const void* x = nullptr;      // [N, C, S]
  void* y = nullptr;            // [N, C, S]
  const void* mean = nullptr;   // [C] acc
  const void* scale = nullptr;  // [C] acc, weight * rstd
  const void* shift = nullptr;  // [C] acc, bias
  // y = act(fma(x - mean, scale, shift) + residual)
  const void* residual = nullptr;  // [N, C, S] or null
  Activation act = Activation::Identity;
  double slope = 0;         // of leaky_relu
  uint8_t* mask = nullptr;  // MaskRows of bits, written; or null
  // CPU: whether y is written past the caches, and how many elements ahead x and residual are
  // fetched then.
  bool stream = false;
  int64_t ahead = 0;
};

struct BackwardParams {
  Shape shape;
  DType dtype = DType::Float;  // of dy, x, dx, residual and dresidual
  const void* dy = nullptr;    // [N, C, S]
  const void* x = nullptr;     // [N, C, S]
  void* dx = nullptr;          // [N, C, S] or null
  const void* mean = nullptr;  // [C] acc
  const void* rstd = nullptr;  // [C] acc
  // With xhat = (x - mean) * rstd: dx = ((dy - mean_dy) - xhat * mean_dy_xhat) * scale;
  // without mean_dy (inference: the statistics are constants) dx = dy * scale.
  const void* mean_dy = nullptr;       // [C] acc or null
  const void* mean_dy_xhat = nullptr;  // [C] acc or null
  const void* scale = nullptr;         // [C] acc, weight * rstd
  // dy is first made the gradient of z = fma(x - mean, scale, shift) + residual, of which y is act.
  const void* shift = nullptr;     // [C] acc, bias; null where act is identity
  const void* residual = nullptr;  // [N, C, S] or null
  Activation act = Activation::Identity;
  double slope = 0;               // of leaky_relu
  const uint8_t* mask = nullptr;  // what forward wrote, in place of z; or null
  void* dresidual = nullptr;      // [N, C, S] the gradient of z, or null
  // CPU: whether dx and dresidual are written past the caches, and how far ahead dy, x and residual
  // are fetched then.
  bool stream = false;
  int64_t ahead = 0;
};

}  // namespace bnorm_ext
