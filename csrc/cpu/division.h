// Which part of a pass each thread takes: a share of the chunks (plan.h), or of the samples.
//
// Free of torch headers. In an unnamed namespace, like plan.h.
#pragma once

#include <cstdint>

#include "plan.h"

namespace bnorm_ext {
namespace cpu {
namespace {

// Shares of the chunks' units (plan.h) in memory order, as equal as units allow. A thread takes
// whole chunks, and at the ends of its share some channels of a chunk that it shares with others.
// Where chunks are pieces of a row, a thread continues a row with its next piece.
class Division {
 public:
  // whole_bytes: units are whole bytes of a mask. For that they may have fewer samples than chunks
  // have: such a division is for passes without sums.
  Division(const Shape& shape, const Chunks& chunks, int64_t threads, bool whole_bytes)
      : C_(shape.C),
        S_(shape.S),
        N_(shape.N),
        positions_(chunks.positions()),
        pieces_(chunks.pieces()),
        threads_(working_threads(shape.numel(), threads)) {
    set_samples(chunks.samples());
    const bool all_channels = samples_per_summed_row(shape) > 1;
    set_unit(all_channels ? C_ : aligned_unit(shape));
    while (!all_channels && busiest() * threads_ * 10 > N_ * C_ * S_ * 11) {
      if (is_halved(shape, unit_) && !(whole_bytes && unit_ / 2 * S_ % 8 != 0)) {
        set_unit(unit_ / 2);
      } else if (whole_bytes && samples_ > 1) {
        set_samples(ceil_div(samples_, 2));
      } else {
        break;
      }
    }
  }

  int64_t threads() const { return threads_; }

  // Elements of thread t, which is below threads().
  int64_t elements(int64_t t) const {
    return first_element(begin(t + 1)) - first_element(begin(t));
  }

  // Calls f(k, c0, c1) for each part of thread t's share, at most kMaxChannelsPerCall channels each;
  // in memory order, or in reverse. k: the chunk, which is span(k).
  template <typename F>
  void for_each(int64_t t, bool reverse, F f) const {
    const int64_t first = begin(t), last = begin(t + 1);
    if (pieces_ > 1) {
      for (int64_t i = first; i < last; ++i) {
        const int64_t row = (reverse ? first + (last - 1 - i) : i) / pieces_;
        const int64_t piece = (reverse ? first + (last - 1 - i) : i) % pieces_;
        f(row / C_ * pieces_ + piece, row % C_, row % C_ + 1);
      }
      return;
    }
    if (first == last) return;
    const int64_t g0 = first / units_, g1 = (last - 1) / units_;
    for (int64_t i = g0; i <= g1; ++i) {
      const int64_t g = reverse ? g0 + (g1 - i) : i;
      const int64_t c0 = (max(first, g * units_) - g * units_) * unit_;
      const int64_t c1 = min((min(last, (g + 1) * units_) - g * units_) * unit_, C_);
      for (int64_t c = c0; c < c1; c += kMaxChannelsPerCall) {
        f(g, c, min(c + kMaxChannelsPerCall, c1));
      }
    }
  }

  Span span(int64_t k) const {
    const int64_t n0 = k / pieces_ * samples_, s0 = k % pieces_ * positions_;
    return {n0, min(n0 + samples_, N_), s0, min(s0 + positions_, S_)};
  }

 private:
  void set_unit(int64_t unit) {
    unit_ = unit;
    units_ = ceil_div(C_, unit);
  }
  void set_samples(int64_t samples) {
    samples_ = samples;
    groups_ = ceil_div(N_, samples);
  }
  int64_t samples(int64_t group) const { return min(samples_, N_ - group * samples_); }

  // The first unit of thread t: the one that starts nearest to t equal shares. Units are counted by
  // group of samples, then channels, then pieces of a row.
  int64_t begin(int64_t t) const {
    if (t == threads_) return groups_ * units_ * pieces_;
    const int64_t group_size = samples_ * C_ * S_, element = N_ * C_ * S_ * t / threads_;
    const int64_t group = element / group_size, rest = element % group_size;
    if (pieces_ > 1) {
      return (group * C_ + rest / S_) * pieces_ +
             min((rest % S_ + positions_ / 2) / positions_, pieces_);
    }
    const int64_t width = samples(group) * unit_ * S_;
    return group * units_ + min((rest + width / 2) / width, units_);
  }

  int64_t first_element(int64_t unit) const {
    if (pieces_ > 1) return unit / pieces_ * S_ + min(unit % pieces_ * positions_, S_);
    const int64_t group = unit / units_;
    const int64_t start = group * samples_ * C_ * S_;
    if (group == groups_) return N_ * C_ * S_;
    return start + min(unit % units_ * unit_, C_) * samples(group) * S_;
  }

  int64_t busiest() const {
    int64_t most = 0;
    for (int64_t t = 0; t < threads_; ++t) most = max(most, elements(t));
    return most;
  }

  int64_t C_, S_, N_;
  int64_t positions_, pieces_;  // of Chunks
  int64_t threads_;
  int64_t samples_ = 1, groups_ = 1;  // samples of a chunk, groups of so many
  int64_t unit_ = 1, units_ = 1;      // channels of a unit, units of a group
};

// Shares of the samples, for passes without sums, as equal as sample_unit() allows.
class SampleDivision {
 public:
  SampleDivision(const Shape& shape, int64_t threads)
      : N_(shape.N),
        unit_(sample_unit(shape)),
        units_(ceil_div(N_, unit_)),
        threads_(working_threads(shape.numel(), threads)) {}

  int64_t threads() const { return threads_; }
  bool is_even() const { return divides_well(units_, threads_); }
  int64_t begin(int64_t t) const { return min(units_ * t / threads_ * unit_, N_); }

 private:
  int64_t N_, unit_, units_, threads_;
};

}  // namespace
}  // namespace cpu
}  // namespace bnorm_ext
