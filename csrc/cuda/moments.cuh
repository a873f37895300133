// A thread's sums for mean and variance.
#pragma once

#include "channel.cuh"
#include "params.h"
#include "tile_iterator.cuh"
#include "vec.cuh"

namespace bnorm_ext {
namespace cuda {

// The sums of d = x - anchor and of d^2 over a run of a thread's vectors, for each channel.
//
// The anchor is the mean of the run's first batch, so that nothing cancels, however large the mean.
// Even where those values lie far from the others, it is within sqrt(kRun - 1) standard deviations
// of the run's mean, because they are 1 / kRun of its values (Samuelson's inequality): d^2 loses log2
// of kRun bits at most. In a run everything is in the accumulation type: d is exact up to its last
// bit, each batch is added up on its own, and the at most kRun sums of batches one after the other.
// Runs are added in double, as sums of the deviations from one value of the channel, the same in all
// threads.
template <typename V>
class MomentSums {
 public:
  using T = typename V::T;
  using A = Acc<T>;
  using Vector = Values<T, V::kWidth>;
  static constexpr int kChannels = TileIterator<V::kWidth, V::kMapping>::kChannels;
  static constexpr int kPerVector = V::kWidth / kChannels;  // values of one channel in a vector

  __device__ __forceinline__ MomentSums() {
#pragma unroll
    for (int k = 0; k < kChannels; ++k) anchor_[k] = sum_[k] = squares_[k] = 0;
  }
  __device__ __forceinline__ bool is_empty() const { return count_ == 0; }

  // Takes the anchor from the first batch of a run, or from vectors of it.
  template <typename Valid>
  __device__ __forceinline__ void begin(const Vector (&batch)[kBatch], Valid valid) {
#pragma unroll
    for (int k = 0; k < kChannels; ++k) {
      A total = 0;
#pragma unroll
      for (int u = 0; u < kBatch; ++u) {
        if (u < valid) total += of_vector(batch[u], k, [](A value) { return value; });
      }
      anchor_[k] = total * (A{1} / static_cast<A>(valid * kPerVector));
    }
  }

  template <typename Valid>
  __device__ __forceinline__ void add(const Vector (&batch)[kBatch], Valid valid) {
    count_ += valid * kPerVector;
#pragma unroll
    for (int k = 0; k < kChannels; ++k) {
      A sum = 0, squares = 0;
#pragma unroll
      for (int u = 0; u < kBatch; ++u) {
        if (u >= valid) continue;
        // A vector of one value needs no sum of its own.
        A of_squares = kPerVector == 1 ? squares : 0;
        sum += of_vector(batch[u], k, [&](A value) {
          const A d = value - anchor_[k];
          of_squares = fma(d, d, of_squares);
          return d;
        });
        squares = kPerVector == 1 ? of_squares : squares + of_squares;
      }
      sum_[k] += sum;
      squares_[k] += squares;
    }
  }

  // Adds the run to `total`, whose sums are relative to about(k).
  template <typename About>
  __device__ __forceinline__ void end(Pair (&total)[kChannels], About about) const {
    const double n = count_;
#pragma unroll
    for (int k = 0; k < kChannels; ++k) {
      const double shift = static_cast<double>(anchor_[k]) - about(k), sum = sum_[k];
      total[k].a += n * shift + sum;
      total[k].b += squares_[k] + shift * (2 * sum + n * shift);
    }
  }

 private:
  template <typename F>
  static __device__ __forceinline__ A of_vector(const Vector& vector, int k, F f) {
    A sum = f(vector[k]);
#pragma unroll
    for (int i = 1; i < kPerVector; ++i) sum += f(vector[k * kPerVector + i]);
    return sum;
  }

  A anchor_[kChannels], sum_[kChannels], squares_[kChannels];
  int count_ = 0;  // values of each channel
};

constexpr int kRun = 16;  // batches

// False: everything has to be summed again in double. Either the data is not finite, or the
// accumulation type overflowed although the result fits.
template <int kChannels>
__device__ __forceinline__ bool all_finite(const Pair (&sum)[kChannels]) {
  bool all = true;
#pragma unroll
  for (int k = 0; k < kChannels; ++k) all = all && is_finite(sum[k].a) && is_finite(sum[k].b);
  return all;
}

// In double, about the same value.
template <typename V, typename About>
__device__ __forceinline__ void add_in_double(
    const Values<typename V::T, V::kWidth>& vector, About about,
    Pair (&total)[TileIterator<V::kWidth, V::kMapping>::kChannels]) {
  constexpr int kChannels = TileIterator<V::kWidth, V::kMapping>::kChannels;
#pragma unroll
  for (int v = 0; v < V::kWidth; ++v) {
    const double d = static_cast<double>(vector[v]) - about(v % kChannels);
    total[v % kChannels].a += d;
    total[v % kChannels].b += d * d;
  }
}

// What the deviations of channel c are taken from: its first value, or for double data, where every
// bit of the sums counts, the mean of several values spread over the channel; 0 where that is not
// finite. It lies between the channel's smallest and largest value, so within sqrt(n) standard
// deviations of the mean: the squares lose at most log2(n) of 53 bits.
template <typename T>
__device__ __forceinline__ double anchor_of(const void* x, const Shape& shape, int64_t c) {
  double value = 0;
  if constexpr (sizeof(T) < sizeof(double)) {
    value = load_one(first_of_channel<T>(x, shape, c));
  } else {
    const int64_t count = shape.N * shape.S, samples = count < 8 ? count : 8;
    for (int64_t i = 0; i < samples; ++i) {
      const int64_t at = i * (count / samples), n = at / shape.S, s = at - n * shape.S;
      value += load_one(static_cast<const T*>(x) + (shape.layout == Layout::ChannelsLast
                                                        ? at * shape.C + c
                                                        : (n * shape.C + c) * shape.S + s));
    }
    value /= static_cast<double>(samples);
  }
  return is_finite(value) ? value : 0;
}

}  // namespace cuda
}  // namespace bnorm_ext
