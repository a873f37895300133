// What the host code of forward and backward does per channel: it reads and writes parameters,
// merges the results of chunks, keeps coefficients for the kernels, updates running statistics.
#pragma once

#include <ATen/ATen.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <cmath>

#include "../tensors.h"
#include "../variance.h"
#include "params.h"
#include "scratch.h"

namespace bnorm_ext {
namespace cpu {

using at::Tensor;

inline double get(const ChannelVector& v, int64_t c) {
  const int64_t i = c * v.stride;
  switch (v.dtype) {
    case DType::Float:
      return static_cast<const float*>(v.data)[i];
    case DType::Double:
      return static_cast<const double*>(v.data)[i];
    case DType::Half:
      return static_cast<const c10::Half*>(v.data)[i];
    default:
      return static_cast<const c10::BFloat16*>(v.data)[i];
  }
}

inline void set(const ChannelVector& v, int64_t c, double value) {
  const int64_t i = c * v.stride;
  switch (v.dtype) {
    case DType::Float:
      static_cast<float*>(v.data)[i] = static_cast<float>(value);
      break;
    case DType::Double:
      static_cast<double*>(v.data)[i] = value;
      break;
    case DType::Half:
      static_cast<c10::Half*>(v.data)[i] = static_cast<float>(value);
      break;
    default:
      static_cast<c10::BFloat16*>(v.data)[i] = static_cast<float>(value);
  }
}

inline double get_or(const ChannelVector& v, int64_t c, double otherwise) {
  return v.data == nullptr ? otherwise : get(v, c);
}

// A sum that keeps what rounding leaves out of it (Knuth, The Art of Computer Programming, 4.2.2):
// hundreds of equal values, whose roundings would add up, lose nothing.
class CompensatedSum {
 public:
  void add(double value) {
    const double sum = sum_ + value, added = sum - sum_;
    rest_ += (sum_ - (sum - added)) + (value - added);
    sum_ = sum;
  }
  // The rest of an infinite sum is NaN.
  double result() const { return rest_ - rest_ == 0 ? sum_ + rest_ : sum_; }

 private:
  double sum_ = 0, rest_ = 0;
};

// The moments of one channel, merged from those of its chunks in index order. Deviations are taken
// from the first chunk's anchor (0 where that is not finite), which in double loses at most
// log2(number of chunks) + 1 of 53 bits.
class ChannelMoments {
 public:
  void add(const Moments& chunk, double count) {
    if (count_ == 0 && chunk.anchor - chunk.anchor == 0) anchor_ = chunk.anchor;
    const double d = (chunk.anchor - anchor_) + chunk.delta;
    count_ += count;
    d_.add(count * d);
    d2_.add(chunk.m2 + count * d * d);
  }
  struct MeanVar {
    double mean, var;
    double anchor, delta;  // the mean is their sum
  };
  MeanVar result() const {
    const double per_value = 1 / count_, d = d_.result() * per_value;
    const double v = d2_.result() * per_value - d * d;
    return {anchor_ + d, clamp_variance(v), anchor_, d};
  }

 private:
  double count_ = 0, anchor_ = 0;
  CompensatedSum d_, d2_;
};

// The backward sums of one channel, merged in the same order.
class ChannelSums {
 public:
  void add(const Sums& chunk, double) {
    dy_.add(chunk.dy);
    dy_xhat_.add(chunk.dy_xhat);
  }
  Sums result() const { return {dy_.result(), dy_xhat_.result()}; }

 private:
  CompensatedSum dy_, dy_xhat_;
};

// [C] arrays of the accumulation type, which threads fill channel by channel.
template <typename A>
class Coefficients {
 public:
  Coefficients(int64_t arrays, int64_t C) : C_(C), values_(arrays * C) {}
  A* operator[](int64_t i) { return values_.data() + i * C_; }

 private:
  int64_t C_;
  Scratch<A, 4 * 512> values_;
};

// Updates the running statistics with this batch: computed in double, whatever their dtype.
class RunningStatistics {
 public:
  RunningStatistics(const RunningUpdate& update, int64_t count)
      : update_(update), unbiased_(static_cast<double>(count) / static_cast<double>(count - 1)) {
    if (update_.cumulative) {
      update_.momentum = 1.0 / static_cast<double>(*update_.num_batches_tracked + 1);
    }
  }

  void update(int64_t c, double mean, double var) const {
    if (update_.mean.data == nullptr) return;
    const double m = update_.momentum;
    set(update_.mean, c, m * mean + (1 - m) * get(update_.mean, c));
    set(update_.var, c, m * (var * unbiased_) + (1 - m) * get(update_.var, c));
  }

  void count_batch() const {
    if (update_.num_batches_tracked != nullptr) ++*update_.num_batches_tracked;
  }

 private:
  RunningUpdate update_;
  double unbiased_;  // n / (n - 1), from the biased to the unbiased variance
};

template <typename F>
auto with_accumulator(DType dtype, F f) {
  return dtype == DType::Double ? f(double{}) : f(float{});
}

template <typename A>
double rstd_of(double var, double eps) {
  return static_cast<A>(1.0 / std::sqrt(var + eps));
}

}  // namespace cpu
}  // namespace bnorm_ext
