// SPDX-License-Identifier: Apache-2.0
#include "io/gguf.h"

#include <array>
#include <type_traits>
#include <utility>

#include "base/error.h"
#include "io/gguf_contents.h"
#include "io/printable.h"

namespace kilin::io {

std::string_view kind_of(const GgufValue& value) {
  constexpr std::array<std::string_view, 4> kKinds = {"an integer", "a float", "a bool", "a string"};
  constexpr std::array<std::string_view, 4> kArrays = {"an array of integers", "an array of floats",
                                                       "an array of strings", "an array of bools"};
  if (const auto* array = std::get_if<GgufArray>(&value)) return kArrays[array->index()];
  return kKinds[value.index()];
}

GgufFile::GgufFile(std::shared_ptr<const Contents> contents) : contents_(std::move(contents)) {}

const TensorView* GgufFile::find(std::string_view name) const {
  const auto at = contents_->tensors.find(name);
  if (at == contents_->tensors.end()) return nullptr;
  const Contents::Tensor& tensor = at->second;
  check(tensor.readable,
        "{}: tensor '{}': type: found {}, expected F32, F16, BF16, F64, I32, I64, Q8_0, Q5_0, Q4_0, Q4_K or "
        "Q6_K",
        path(), printable(name), tensor.type);
  return &tensor.view;
}

bool GgufFile::contains(std::string_view name) const { return contents_->tensors.contains(name); }

const std::vector<std::string>& GgufFile::names() const { return contents_->names; }

std::string_view GgufFile::type_name(std::string_view name) const {
  const auto at = contents_->tensors.find(name);
  check(at != contents_->tensors.end(), "{}: tensor '{}': found nothing of that name among {} tensors",
        path(), printable(name), names().size());
  return at->second.type;
}

bool GgufFile::has(std::string_view key) const { return value(key) != nullptr; }

const GgufValue* GgufFile::value(std::string_view key) const {
  const auto at = contents_->metadata.find(key);
  return at == contents_->metadata.end() ? nullptr : &at->second;
}

// T is an alternative of GgufValue or of GgufArray.
template <class T>
const T& GgufFile::get(std::string_view key, std::string_view expected) const {
  const GgufValue* found = value(key);
  check(found != nullptr, "{}: key '{}': missing, expected {}", path(), printable(key), expected);
  const T* result = nullptr;
  if constexpr (std::is_constructible_v<GgufArray, std::in_place_type_t<T>>) {
    const auto* array = std::get_if<GgufArray>(found);
    result = array == nullptr ? nullptr : std::get_if<T>(array);
  } else {
    result = std::get_if<T>(found);
  }
  check(result != nullptr, "{}: key '{}': found {}, expected {}", path(), printable(key), kind_of(*found),
        expected);
  return *result;
}

int64_t GgufFile::get_int(std::string_view key) const { return get<int64_t>(key, "an integer"); }
int64_t GgufFile::get_int(std::string_view key, int64_t fallback) const {
  return has(key) ? get_int(key) : fallback;
}

double GgufFile::get_double(std::string_view key) const {
  const GgufValue* found = value(key);
  const auto* integer = found == nullptr ? nullptr : std::get_if<int64_t>(found);
  return integer != nullptr ? static_cast<double>(*integer) : get<double>(key, "a number");
}
double GgufFile::get_double(std::string_view key, double fallback) const {
  return has(key) ? get_double(key) : fallback;
}

bool GgufFile::get_bool(std::string_view key, bool fallback) const {
  return has(key) ? get<bool>(key, "a bool") : fallback;
}

const std::string& GgufFile::get_string(std::string_view key) const {
  return get<std::string>(key, "a string");
}
std::string GgufFile::get_string(std::string_view key, std::string_view fallback) const {
  return has(key) ? get_string(key) : std::string(fallback);
}

const std::vector<int64_t>& GgufFile::get_ints(std::string_view key) const {
  return get<std::vector<int64_t>>(key, "an array of integers");
}
const std::vector<double>& GgufFile::get_doubles(std::string_view key) const {
  return get<std::vector<double>>(key, "an array of floats");
}
const std::vector<std::string>& GgufFile::get_strings(std::string_view key) const {
  return get<std::vector<std::string>>(key, "an array of strings");
}

const std::map<std::string, GgufValue, std::less<>>& GgufFile::metadata() const {
  return contents_->metadata;
}

const std::string& GgufFile::path() const { return contents_->path; }
std::vector<std::string> GgufFile::files() const { return contents_->paths; }
uint64_t GgufFile::data_bytes() const { return contents_->data_bytes; }

void GgufFile::advise(Access access) const {
  for (const auto& file : contents_->files) file->advise(access);
}

}  // namespace kilin::io
