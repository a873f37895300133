// Reading and writing the mask bits of a thread's vectors (mask.h describes the layout).
#pragma once

#include "mask.h"
#include "platform.cuh"
#include "tile_iterator.cuh"

namespace bnorm_ext {
namespace cuda {

// Follows a TileIterator, a batch at a time. The bits of a batch are one word, those of its vector
// u from bit u * 8 on. A vector of fewer than 8 values shares its byte with vectors of adjacent
// lanes.
//
// ChannelsFirst  a block's vectors are consecutive in the channel, and the number of its first one
//                is a multiple of kThreads, so each aligned group of 8 / kWidth lanes has one byte
// ChannelsLast   the same for adjacent columns, or for fewer where the block has fewer columns: a
//                tile is all channels, or a multiple of 8
// ChannelGroups  each vector has a byte
//
// From one vector of a thread to its next one the byte advances by a constant, and the position in
// the byte stays the same.
template <typename Byte, int kWidth, Mapping kMapping>
class MaskCursor {
 public:
  static_assert(kByteBits % kWidth == 0, "no vector lies in two bytes");
  static_assert(kBatch * kByteBits == 32, "the bits of a batch are one word");
  static_assert(kThreads % kByteBits == 0, "a thread's bits are at the same position in each byte");
  static_assert(kWideColumns % kByteBits == 0 && kNarrowColumns % kByteBits == 0,
                "neighbouring tiles share no byte");
  static_assert(32 % (kByteBits / kWidth) == 0, "the lanes of one byte are in one warp");

  __device__ __forceinline__ MaskCursor(const Mask<Byte>& mask, const TilePlan& plan,
                                        const TileIterator<kWidth, kMapping>& it)
      : mask_(mask.bytes) {
    if (kMapping == Mapping::ChannelGroups) {
      byte_ = it.offset / kWidth;
      step_ = plan.step / kWidth;
      shift_ = 0;
      lanes_ = 1;
      return;
    }
    constexpr bool kLast = kMapping == Mapping::ChannelsLast;
    const int64_t first = it.chunk * plan.chunk_length + it.row;  // vector or row
    const int64_t bit = kLast ? it.channel : first * kWidth;
    byte_ = (kLast ? first : it.channel) * mask.row_bytes + bit / kByteBits;
    step_ = kLast ? plan.stride * mask.row_bytes : kThreads * kWidth / kByteBits;
    shift_ = kWidth == kByteBits ? 0 : static_cast<int>(bit % kByteBits);
    lanes_ = kByteBits / kWidth;
    if (kLast && plan.columns < lanes_) lanes_ = plan.columns;
  }

  // Where the iterator's at_the_end() is, and from there backward.
  __device__ __forceinline__ MaskCursor at_the_end(int remaining) const {
    MaskCursor cursor = *this;
    cursor.byte_ += (remaining - 1) * step_;
    cursor.step_ = -step_;
    return cursor;
  }

  // Every lane of the warp must call; only the first `valid` vectors may have bits. The first lane
  // of a byte writes it: if any lane of the byte has a vector, the first one has.
  __device__ __forceinline__ void write(unsigned mask_bits, int valid) {
    mask_bits <<= shift_;
    for (int apart = 1; apart < lanes_; apart *= 2) {
      mask_bits |= __shfl_xor_sync(0xffffffffu, mask_bits, apart);
    }
    const bool is_first = (threadIdx.x & (lanes_ - 1)) == 0;
#pragma unroll
    for (int u = 0; u < kBatch; ++u) {
      if (!is_first || u >= valid) break;
      const auto bits = static_cast<unsigned char>(mask_bits >> u * kByteBits);
      store_bytes<1>(mask_ + byte_ + u * step_, Bytes<1>{{bits}});
    }
    byte_ += kBatch * step_;
  }

  // The bits of the next kCount vectors, of which the first `valid` exist: bit u * 8 + v is that of
  // value v of vector u; the other bits are undefined.
  template <int kCount = kBatch>
  __device__ __forceinline__ unsigned read(int valid) {
    unsigned mask_bits = 0;
#pragma unroll
    for (int u = 0; u < kCount; ++u) {
      if (u >= valid) break;
      const unsigned bits = load_bytes<1>(mask_ + byte_ + u * step_).word[0];
      mask_bits |= bits << u * kByteBits;
    }
    byte_ += kCount * step_;
    return mask_bits >> shift_;
  }

 private:
  Byte* mask_;    // may be null: then neither read nor write may be called
  int64_t byte_;  // of the thread's next vector
  int64_t step_;  // in bytes, from one vector of the thread to its next
  int shift_;     // of a vector's first bit in its byte
  int lanes_;     // number of adjacent lanes that share a byte
};

}  // namespace cuda
}  // namespace bnorm_ext
