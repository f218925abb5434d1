// SPDX-License-Identifier: Apache-2.0
// Three kinds of failure, three idioms:
//   KILIN_ASSERT  a programmer's mistake, never reachable by input (checked in debug and test builds)
//   Error         bad files and bad arguments: one clear line naming the file, the field, found and expected
//   return value  expected outcomes (end of text, limit reached)
#pragma once
#include <fmt/format.h>

#include <cassert>
#include <stdexcept>
#include <string>

namespace kilin {

// Bad input: what() is one complete line for a user, without a trailing newline.
class Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// fail("{}: tensor '{}' has shape {}, expected {}", file, name, found, expected) throws Error.
template <class... Args>
[[noreturn]] void fail(fmt::format_string<Args...> format, Args&&... args) {
  throw Error(fmt::format(format, std::forward<Args>(args)...));
}

// check(ok, format, args...) throws Error when the condition does not hold. The arguments are evaluated in
// any case, and perhaps before the condition: where they need it to fail, write `if (...) fail(...)`.
template <class... Args>
void check(bool ok, fmt::format_string<Args...> format, Args&&... args) {
  if (!ok) [[unlikely]] {
    throw Error(fmt::format(format, std::forward<Args>(args)...));
  }
}

}  // namespace kilin

#define KILIN_ASSERT(condition) assert(condition)
