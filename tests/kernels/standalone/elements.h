// Memory for tensors, and their elements as double. Conversions are written out here, apart from
// those of the kernels, which they serve to check.
#pragma once

#include <cpu/params.h>

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>

using bnorm_ext::DType;

// Of a binary floating-point format.
struct Format {
  const char* name;
  size_t bytes;
  int digits;  // of the significand, the leading one included
  int lowest;  // exponent of the smallest normal number
  double roundoff() const { return std::ldexp(1, -digits); }
  double smallest() const { return std::ldexp(1, lowest - digits + 1); }  // subnormal
  double beyond() const {
    return std::ldexp(1, 2 - lowest);
  }  // the power of two behind the largest
};

inline const Format& format_of(DType dtype) {
  static const Format formats[] = {{"float32", 4, 24, -126},
                                   {"float64", 8, 53, -1022},
                                   {"float16", 2, 11, -14},
                                   {"bfloat16", 2, 8, -126}};
  return formats[static_cast<int>(dtype)];
}

inline int exponent_of(const Format& f, double value) {  // of the last place's binade
  return value == 0 ? f.lowest : std::max(std::ilogb(value), f.lowest);
}

// To nearest, ties to even, as the processor does with the values that double holds.
inline double rounded(const Format& f, double value) {
  if (value - value != 0 || f.digits == 53) return value;
  const double place = std::ldexp(1, exponent_of(f, value) - f.digits + 1);
  const double result = std::nearbyint(value / place) * place;
  return std::fabs(result) < f.beyond() ? result : std::copysign(INFINITY, value);
}

// The 16 bits of a value that `rounded` has returned. Any NaN becomes one of them.
inline uint16_t to_bits(const Format& f, double value) {
  const unsigned sign = std::signbit(value) ? 0x8000u : 0u;
  const unsigned infinite = 0x8000u - (1u << (f.digits - 1));
  if (value != value) return static_cast<uint16_t>(infinite + 1);
  if (std::isinf(value)) return static_cast<uint16_t>(sign + infinite);
  const int exponent = exponent_of(f, value);
  const double significand = std::ldexp(std::fabs(value), f.digits - 1 - exponent);
  const unsigned biased = static_cast<unsigned>(exponent - f.lowest) << (f.digits - 1);
  return static_cast<uint16_t>(sign + biased + static_cast<unsigned>(significand));
}

inline double from_bits(const Format& f, uint16_t bits) {
  const double sign = (bits & 0x8000u) != 0 ? -1 : 1;
  const unsigned leading = 1u << (f.digits - 1), magnitude = bits & 0x7fffu;
  const unsigned infinite = 0x8000u - leading;
  if (magnitude >= infinite) return sign * (magnitude > infinite ? NAN : INFINITY);
  const int exponent = std::max(1, static_cast<int>(magnitude / leading));
  const unsigned significand = magnitude % leading + (magnitude < leading ? 0 : leading);
  return sign * std::ldexp(significand, exponent - 1 + f.lowest - f.digits + 1);
}

// Bytes that begin where torch's tensors do.
class Buffer {
 public:
  explicit Buffer(size_t bytes)
      : bytes_(bytes),
        data_(std::aligned_alloc(kAlign, (bytes + kAlign) / kAlign * kAlign), std::free) {
    std::memset(data_.get(), 0, bytes);
  }
  template <typename T = void>
  T* as() const {
    return static_cast<T*>(data_.get());
  }
  size_t bytes() const { return bytes_; }
  bool operator==(const Buffer& other) const {
    return bytes_ == other.bytes_ && std::memcmp(as(), other.as(), bytes_) == 0;
  }

 private:
  static constexpr size_t kAlign = 64;
  size_t bytes_;
  std::unique_ptr<void, decltype(&std::free)> data_;
};

// A tensor of floating-point numbers.
class Elements : public Buffer {
 public:
  Elements(DType dtype, int64_t count)
      : Buffer(static_cast<size_t>(count) * format_of(dtype).bytes), dtype_(dtype) {}
  double operator[](int64_t i) const {
    if (dtype_ == DType::Float) return as<float>()[i];
    if (dtype_ == DType::Double) return as<double>()[i];
    return from_bits(format_of(dtype_), as<uint16_t>()[i]);
  }
  void set(int64_t i, double value) {
    if (dtype_ == DType::Float) {
      as<float>()[i] = static_cast<float>(value);
    } else if (dtype_ == DType::Double) {
      as<double>()[i] = value;
    } else {
      const Format& f = format_of(dtype_);
      as<uint16_t>()[i] = to_bits(f, rounded(f, value));
    }
  }

 private:
  DType dtype_;
};
