// Reading and writing the bits of a mask (MaskRows in kernels.h), and the expression whose sign
// they keep.
#pragma once

#include "kernels.h"
#include "vec_activation.h"

namespace bnorm_ext {
namespace cpu {
namespace {

// The one expression of the normalisation; d is x - mean.
template <typename V>
BNORM_INLINE V normalise(V d, V scale, V shift) {
  return fma(d, scale, shift);
}

// Bits from `bit` on, the lowest one first; 57 of them are good.
BNORM_INLINE uint64_t read_bits(const uint8_t* mask, int64_t bit) {
  uint64_t word;
  std::memcpy(&word, mask + bit / 8, sizeof word);
  return word >> (bit % 8);
}

// Writes bits in the order of memory. Rows that follow each other within a byte are one to it;
// where a row starts elsewhere, it starts at a whole byte.
class BitWriter {
 public:
  explicit BNORM_INLINE BitWriter(uint8_t* mask) : mask_(mask) {}
  BNORM_INLINE void start(int64_t bit) {
    if (bit == next_) return;
    finish();
    p_ = mask_ + bit / 8;
    next_ = bit;
  }
  BNORM_INLINE void put(uint64_t bits, Full, int64_t width) { put(bits, width); }
  BNORM_INLINE void put(uint64_t bits, Part n, int64_t) {
    put(bits & ((uint64_t{1} << n.n) - 1), n.n);
  }
  BNORM_INLINE void finish() {
    for (; count_ > 0; count_ -= 8, bits_ >>= 8) *p_++ = static_cast<uint8_t>(bits_);
    count_ = 0;
    bits_ = 0;
  }

 private:
  // count <= 32, and fewer than 32 are waiting.
  BNORM_INLINE void put(uint64_t bits, int64_t count) {
    bits_ |= bits << count_;
    count_ += count;
    next_ += count;
    if (count_ < 32) return;
    const uint32_t whole = static_cast<uint32_t>(bits_);
    std::memcpy(p_, &whole, sizeof whole);
    p_ += sizeof whole;
    bits_ >>= 32;
    count_ -= 32;
  }

  uint8_t* mask_;
  uint8_t* p_ = nullptr;  // where the waiting bits go
  int64_t next_ = -1;     // the bit that is put next
  uint64_t bits_ = 0;     // waiting, count_ of them
  int64_t count_ = 0;
};

}  // namespace
}  // namespace cpu
}  // namespace bnorm_ext
