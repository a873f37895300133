// In place of torch's header of this name.
#pragma once

#include <stdexcept>
#include <string>

namespace c10 {

template <typename... Words>
[[noreturn]] void throw_value_error(const Words&... words) {
  std::string text;
  ((text += words), ...);
  throw std::invalid_argument(text);
}

}  // namespace c10

#define TORCH_CHECK_VALUE(condition, ...) \
  if (!(condition)) c10::throw_value_error(__VA_ARGS__)
