// Reading and writing the bits of a mask. MaskRows (plan.h) says where they are.
#pragma once

#include <cstdint>
#include <cstring>

#include "vec.h"

namespace bnorm_ext {
namespace cpu {
namespace {

// The bits from `bit` on, lowest first. At least 57 of them are valid.
BNORM_INLINE uint64_t read_bits(const uint8_t* mask, int64_t bit) {
  uint64_t word;
  std::memcpy(&word, mask + bit / 8, sizeof word);
  return word >> (bit % 8);
}

// Writes bits in memory order. A row that starts where the one before ends continues its last byte;
// any other row must start at a whole byte.
class MaskWriter {
 public:
  explicit BNORM_INLINE MaskWriter(uint8_t* mask) : mask_(mask) {}
  BNORM_INLINE void start_row(int64_t bit) {
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
  // count <= 32. Fewer than 32 bits are pending before and after.
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
  uint8_t* p_ = nullptr;  // where the pending bits go
  int64_t next_ = -1;     // the bit that is put next
  uint64_t bits_ = 0;     // pending, count_ of them
  int64_t count_ = 0;
};

// In place of MaskWriter where no mask is written.
struct NoMask {
  explicit BNORM_INLINE NoMask(uint8_t*) {}
  BNORM_INLINE void start_row(int64_t) {}
  BNORM_INLINE void finish() {}
};

}  // namespace
}  // namespace cpu
}  // namespace bnorm_ext
