// SPDX-License-Identifier: Apache-2.0
#include "io/safetensors_writer.h"

#include <algorithm>
#include <nlohmann/json.hpp>
#include <tuple>
#include <vector>

#include "base/error.h"
#include "io/atomic_file.h"
#include "io/printable.h"
#include "io/safetensors.h"

namespace kilin::io {
namespace {

constexpr size_t kAlignment = 8;

using Order = std::vector<const NamedTensor*>;

// Byte size, with the checks that keep the file readable.
uint64_t checked_bytes(const std::string& path, const NamedTensor& tensor) {
  auto bytes = static_cast<int64_t>(dtype_size(tensor.view.dtype)) * 8;  // in bits, the reader's own limit
  bool fits = true;
  for (int64_t size : tensor.view.shape) {
    fits = fits && size >= 0 && !__builtin_mul_overflow(bytes, size, &bytes);
  }
  check(fits, "{}: tensor '{}': shape: found {}, expected non-negative sizes and less than 2^63 bits", path,
        printable(tensor.name), to_string(tensor.view.shape));
  check(bytes == 0 || tensor.view.data != nullptr,
        "{}: tensor '{}': data: found a null pointer, expected {} bytes", path, printable(tensor.name),
        bytes / 8);
  return static_cast<uint64_t>(bytes) / 8;
}

Order layout(const std::string& path, std::span<const NamedTensor> tensors) {
  Order order;
  for (const NamedTensor& tensor : tensors) order.push_back(&tensor);
  std::sort(order.begin(), order.end(), [](const NamedTensor* a, const NamedTensor* b) {
    return std::forward_as_tuple(dtype_size(b->view.dtype), a->name) <
           std::forward_as_tuple(dtype_size(a->view.dtype), b->name);
  });
  std::vector<std::string_view> names;
  for (const NamedTensor* tensor : order) names.push_back(tensor->name);
  std::sort(names.begin(), names.end());
  const auto twice = std::adjacent_find(names.begin(), names.end());
  check(twice == names.end(), "{}: tensor '{}': found twice, expected each name once", path,
        twice == names.end() ? "" : printable(*twice));
  for (std::string_view name : names) {
    check(name != "__metadata__", "{}: tensor '__metadata__': the format reserves this name", path);
  }
  return order;
}

std::string quoted(const std::string& path, const std::string& text) {
  try {
    return nlohmann::json(text).dump();
  } catch (const nlohmann::json::type_error&) {
    fail("{}: name '{}': found bytes that are not UTF-8, expected UTF-8", path, printable(text));
  }
}

std::string header_text(const std::string& path, const Order& order,
                        const std::map<std::string, std::string>& metadata) {
  std::string text = "{";
  if (!metadata.empty()) {
    text += "\"__metadata__\":{";
    for (const auto& [key, value] : metadata) {
      if (text.back() != '{') text += ',';
      text += quoted(path, key) + ":" + quoted(path, value);
    }
    text += "}";
  }
  uint64_t begin = 0;
  for (const NamedTensor* tensor : order) {
    const uint64_t end = begin + checked_bytes(path, *tensor);
    if (text.back() != '{') text += ',';
    text += fmt::format("{}:{{\"dtype\":\"{}\",\"shape\":[{}],\"data_offsets\":[{},{}]}}",
                        quoted(path, tensor->name), dtype_name(tensor->view.dtype),
                        fmt::join(tensor->view.shape, ","), begin, end);
    begin = end;
  }
  text += "}";
  text.resize((text.size() + kAlignment - 1) / kAlignment * kAlignment, ' ');
  check(text.size() <= kMaxSafetensorsHeader, "{}: header: found {} bytes, expected at most {}", path,
        text.size(), kMaxSafetensorsHeader);
  return text;
}

}  // namespace

void write_safetensors(const std::string& path, std::span<const NamedTensor> tensors,
                       const std::map<std::string, std::string>& metadata) {
  const Order order = layout(path, tensors);
  const std::string header = header_text(path, order, metadata);
  std::string length;
  for (size_t i = 0; i < 8; ++i) length += static_cast<char>(header.size() >> (8 * i) & 0xff);

  AtomicFile file(path);
  file.write(length);
  file.write(header);
  for (const NamedTensor* tensor : order) file.write(tensor->view.data, tensor->view.bytes());
  file.commit();
}

}  // namespace kilin::io
