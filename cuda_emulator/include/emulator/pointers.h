// Shared<T>, Distributed<T>, Workspace<T>: like T*, but only whole elements are read and written,
// and each access is recorded.
#pragma once

#include <type_traits>

#include "runtime.h"

namespace emulator {
namespace detail {

// The type of p[i]: converts to T, and a T can be assigned to it. Pointer is the class of p.
template <typename Pointer>
class Element {
 public:
  using T = typename Pointer::Value;
  static_assert(std::is_trivially_copyable<T>::value, "elements are copied as bytes");

  explicit Element(const Pointer& p) : pointer_(p) {}
  Element(const Element&) = default;
  operator T() const { return pointer_.read(); }
  const Element& operator=(const T& value) const {
    pointer_.write(value);
    return *this;
  }
  // Assigning one element to another copies the value, not the address.
  const Element& operator=(const Element& other) const {
    pointer_.write(other.pointer_.read());
    return *this;
  }
  Pointer operator&() const { return pointer_; }

 private:
  Pointer pointer_;
};

// The arithmetic of a pointer. Derived supplies offset(n), same(other) and distance(other).
template <typename Derived>
class Arithmetic {
 public:
  Element<Derived> operator[](std::ptrdiff_t i) const { return Element<Derived>(self().offset(i)); }
  Element<Derived> operator*() const { return Element<Derived>(self()); }
  friend Derived operator+(const Derived& p, std::ptrdiff_t n) { return p.offset(n); }
  friend Derived operator+(std::ptrdiff_t n, const Derived& p) { return p.offset(n); }
  friend Derived operator-(const Derived& p, std::ptrdiff_t n) { return p.offset(-n); }
  friend std::ptrdiff_t operator-(const Derived& a, const Derived& b) { return a.distance(b); }
  friend bool operator==(const Derived& a, const Derived& b) { return a.same(b); }
  friend bool operator!=(const Derived& a, const Derived& b) { return !a.same(b); }
  Derived& operator+=(std::ptrdiff_t n) { return self() = self().offset(n); }
  Derived& operator-=(std::ptrdiff_t n) { return self() = self().offset(-n); }
  Derived& operator++() { return *this += 1; }
  Derived& operator--() { return *this -= 1; }
  Derived operator++(int) {
    Derived before = self();
    *this += 1;
    return before;
  }

 private:
  const Derived& self() const { return static_cast<const Derived&>(*this); }
  Derived& self() { return static_cast<Derived&>(*this); }
};

}  // namespace detail
}  // namespace emulator

namespace bnorm_ext {
namespace cuda {

// A byte offset into the shared memory of one block, which the pointer knows. Shared and
// Distributed differ only in their types.
#define EMULATOR_SHARED_POINTER(Name)                                                              \
  template <typename T>                                                                            \
  class Name : public emulator::detail::Arithmetic<Name<T>> {                                      \
   public:                                                                                         \
    using Value = std::remove_const_t<T>;                                                          \
    Name() = default;                                                                              \
    Name(std::nullptr_t) : block_(nullptr), byte_(0) {}                                            \
    Name(emulator::detail::Block* block, std::ptrdiff_t byte) : block_(block), byte_(byte) {}      \
    Value read() const {                                                                           \
      Value value;                                                                                 \
      emulator::detail::shared_read(block_, byte_, &value, sizeof(T));                             \
      return value;                                                                                \
    }                                                                                              \
    void write(const Value& value) const {                                                         \
      static_assert(!std::is_const<T>::value, "read-only");                                        \
      emulator::detail::shared_write(block_, byte_, &value, sizeof(T));                            \
    }                                                                                              \
    Name offset(std::ptrdiff_t n) const {                                                          \
      return {block_, byte_ + n * static_cast<std::ptrdiff_t>(sizeof(T))};                         \
    }                                                                                              \
    bool same(const Name& other) const { return block_ == other.block_ && byte_ == other.byte_; }  \
    std::ptrdiff_t distance(const Name& other) const {                                             \
      return (byte_ - other.byte_) / static_cast<std::ptrdiff_t>(sizeof(T));                       \
    }                                                                                              \
    emulator::detail::Block* block() const { return block_; }                                      \
    std::ptrdiff_t byte() const { return byte_; }                                                  \
    emulator::detail::Place place() const { return {block_, static_cast<std::uintptr_t>(byte_)}; } \
    explicit operator bool() const { return block_ != nullptr; }                                   \
                                                                                                   \
   private:                                                                                        \
    emulator::detail::Block* block_;                                                               \
    std::ptrdiff_t byte_;                                                                          \
  };
EMULATOR_SHARED_POINTER(Shared)
EMULATOR_SHARED_POINTER(Distributed)
#undef EMULATOR_SHARED_POINTER

// Global memory that one kernel both writes and reads. The host passes T*.
template <typename T>
class Workspace : public emulator::detail::Arithmetic<Workspace<T>> {
 public:
  using Value = std::remove_const_t<T>;
  Workspace() = default;
  Workspace(T* p) : p_(p) {}
  template <typename U, typename = std::enable_if_t<std::is_same<const U, T>::value>>
  Workspace(const Workspace<U>& other) : p_(other.get()) {}
  Value read() const {
    Value value;
    emulator::detail::workspace_read(p_, &value, sizeof(T), alignof(T));
    return value;
  }
  void write(const Value& value) const {
    static_assert(!std::is_const<T>::value, "read-only");
    emulator::detail::workspace_write(p_, &value, sizeof(T), alignof(T));
  }
  // Computed with integers: an offset outside of the array is undefined for pointers, and is
  // reported when it is accessed.
  Workspace offset(std::ptrdiff_t n) const {
    const auto step = static_cast<std::uintptr_t>(n) * sizeof(T);
    return reinterpret_cast<T*>(reinterpret_cast<std::uintptr_t>(p_) + step);
  }
  bool same(const Workspace& other) const { return p_ == other.p_; }
  std::ptrdiff_t distance(const Workspace& other) const { return p_ - other.p_; }
  T* get() const { return p_; }
  emulator::detail::Place place() const { return {nullptr, reinterpret_cast<std::uintptr_t>(p_)}; }
  explicit operator bool() const { return p_ != nullptr; }

 private:
  T* p_;
};

}  // namespace cuda
}  // namespace bnorm_ext
