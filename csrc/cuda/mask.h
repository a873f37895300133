// The layout of the mask of a piecewise linear activation: a bit for each element, 1 where z passes
// the gradient (passes_gradient in ../activation.h). It depends on the shape and the size of an
// element alone, so that every kernel reads what any other has written, whatever the plan and the
// alignment.
//
//   ChannelsFirst  [C, ceil(N * S / 8)] bytes: element j = n * S + s of channel c is bit j % 8 of
//                  byte (c, j / 8)
//   ChannelsLast   [N * S, ceil(C / 8)] bytes: channel c of row r = n * S + s is bit c % 8 of
//                  byte (r, c / 8)
//   ChannelGroups  [N * C * S / width] bytes: a byte for each vector of `width` elements, in memory
//                  order; value v is bit v
// Bits beyond the last element of a row are 0.
#pragma once

#include <cstdint>

#include "plan.h"

namespace bnorm_ext {
namespace cuda {

constexpr int kByteBits = 8;

// Bytes of a row. ChannelGroups has no rows.
constexpr int64_t mask_row_bytes(const Shape& shape) {
  return ceil_div(shape.layout == Layout::ChannelsLast ? shape.C : shape.N * shape.S, kByteBits);
}

constexpr int64_t mask_bytes(const Shape& shape, int element_bytes) {
  if (channels_of_group(shape, element_bytes) != 0) {
    return shape.numel() / (kVectorBytes / element_bytes);
  }
  return (shape.layout == Layout::ChannelsLast ? shape.N * shape.S : shape.C) *
         mask_row_bytes(shape);
}

static_assert(mask_bytes({2, 3, 5, Layout::ChannelsFirst}, 4) == 3 * 2, "10 bits a channel");
static_assert(mask_bytes({2, 3, 5, Layout::ChannelsLast}, 4) == 10 * 1, "3 bits a row");
static_assert(mask_bytes({2, 4, 5, Layout::ChannelsFirst}, 4) == 10, "10 vectors of 4 values");

// A mask as kernels take it: to write (Byte = uint8_t), to read (const uint8_t), or none (null).
template <typename Byte>
struct Mask {
  Byte* bytes = nullptr;  // [rows, row_bytes]
  int64_t row_bytes = 0;
};

template <typename Byte>
Mask<Byte> mask_of(const Shape& shape, Byte* bytes) {
  return {bytes, mask_row_bytes(shape)};
}

}  // namespace cuda
}  // namespace bnorm_ext
