// What the chunks of a channel give together. Free of torch headers.
#pragma once

#include "../variance.h"
#include "params.h"

namespace bnorm_ext {
namespace cpu {

// The moments of one channel, merged from those of its chunks in index order. Deviations are taken
// from the first chunk's anchor (0 where that is not finite), which in double loses at most
// log2(number of chunks) + 1 of 53 bits.
class ChannelMoments {
 public:
  void add(const Moments& chunk, double count) {
    if (count_ == 0 && chunk.anchor - chunk.anchor == 0) anchor_ = chunk.anchor;
    const double d = (chunk.anchor - anchor_) + chunk.delta;
    count_ += count;
    d_ += count * d;
    d2_ += chunk.m2 + count * d * d;
  }
  struct MeanVar {
    double mean, var;
    double anchor, delta;  // the mean is their sum
  };
  MeanVar result() const {
    const double per_value = 1 / count_, d = d_ * per_value, v = d2_ * per_value - d * d;
    return {anchor_ + d, clamp_variance(v), anchor_, d};
  }

 private:
  double count_ = 0, anchor_ = 0, d_ = 0, d2_ = 0;
};

// The backward sums of one channel, merged in the same order.
class ChannelSums {
 public:
  void add(const Sums& chunk, double) {
    dy += chunk.dy;
    dy_xhat += chunk.dy_xhat;
  }
  double dy = 0, dy_xhat = 0;
};

}  // namespace cpu
}  // namespace bnorm_ext
