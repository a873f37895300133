// What the chunks of a channel give together. Free of torch headers.
#pragma once

#include "../variance.h"
#include "params.h"

namespace bnorm_ext {
namespace cpu {

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

}  // namespace cpu
}  // namespace bnorm_ext
