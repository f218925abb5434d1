// SPDX-License-Identifier: Apache-2.0
#include "io/safetensors.h"

#include <algorithm>
#include <array>
#include <nlohmann/json.hpp>
#include <optional>
#include <tuple>
#include <utility>

#include "base/error.h"
#include "io/json.h"
#include "io/printable.h"

namespace kilin::io {
namespace {

using nlohmann::json;

constexpr size_t kLengthBytes = 8;
constexpr int kHeaderDepth = 3;  // header object, tensor object, its arrays
constexpr std::string_view kMetadataKey = "__metadata__";
constexpr std::string_view kLfsPointer = "version https://git-lfs.github.com/";

// All element types of the format, by bits per element; `dtype` where Kilin computes with it.
struct ElementType {
  std::string_view name;
  unsigned bits;
  std::optional<Dtype> dtype;
};
constexpr std::array<ElementType, 21> kElementTypes = {{
    {"F32", 32, Dtype::kF32},     {"F16", 16, Dtype::kF16},     {"BF16", 16, Dtype::kBF16},
    {"F64", 64, Dtype::kF64},     {"I32", 32, Dtype::kI32},     {"I64", 64, Dtype::kI64},
    {"U8", 8, Dtype::kU8},        {"BOOL", 8, std::nullopt},    {"I8", 8, std::nullopt},
    {"I16", 16, std::nullopt},    {"U16", 16, std::nullopt},    {"U32", 32, std::nullopt},
    {"U64", 64, std::nullopt},    {"C64", 64, std::nullopt},    {"F8_E5M2", 8, std::nullopt},
    {"F8_E4M3", 8, std::nullopt}, {"F8_E8M0", 8, std::nullopt}, {"F8_E4M3FNUZ", 8, std::nullopt},
    {"F6_E2M3", 6, std::nullopt}, {"F6_E3M2", 6, std::nullopt}, {"F4", 4, std::nullopt},
}};

uint64_t little_endian(std::span<const std::byte> bytes) {
  uint64_t value = 0;
  for (size_t i = kLengthBytes; i-- > 0;) value = value << 8 | std::to_integer<uint64_t>(bytes[i]);
  return value;
}

std::string describe(const json& value) {
  if (value.is_object()) return "an object";
  if (value.is_array() && value.size() > 8) return fmt::format("an array of {}", value.size());
  // Strings and numbers as they stand; bytes outside ASCII come out escaped.
  return printable(value.dump(-1, ' ', true, json::error_handler_t::replace));
}

}  // namespace

// Turns header and data into entries. Each check throws an Error that names file, tensor, found and expected.
class SafetensorsFile::Parser {
 public:
  Parser(SafetensorsFile& file, std::span<const std::byte> bytes) : file_(file), bytes_(bytes) {}

  void run() {
    const json header = read_header();
    for (const auto& [name, value] : header.items()) {
      if (name == kMetadataKey) {
        read_metadata(value);
      } else {
        read_tensor(name, value);
      }
    }
    order_by_data();
    check_no_holes();
  }

 private:
  template <class... Args>
  void require(bool ok, fmt::format_string<Args...> format, Args&&... args) const {
    if (!ok) fail("{}: {}", file_.path_, fmt::format(format, std::forward<Args>(args)...));
  }
  template <class Found, class Expected>
  void require_field(bool ok, std::string_view tensor, std::string_view field, const Found& found,
                     const Expected& expected) const {
    if (!ok) {
      fail("{}: tensor '{}': {}: found {}, expected {}", file_.path_, printable(tensor), field, found,
           expected);
    }
  }

  json read_header() {
    const std::string_view text(reinterpret_cast<const char*>(bytes_.data()), bytes_.size());
    require(!text.starts_with(kLfsPointer),
            "found a Git LFS pointer, expected the file itself (run: git lfs pull)");
    require(bytes_.size() >= kLengthBytes, "header length: found a file of {} bytes, expected at least {}",
            bytes_.size(), kLengthBytes);
    const uint64_t length = little_endian(bytes_);
    require(length <= kMaxSafetensorsHeader, "header length: found {} bytes, expected at most {}", length,
            kMaxSafetensorsHeader);
    require(length <= bytes_.size() - kLengthBytes,
            "header length: found {} bytes, expected at most {} (the file has {})", length,
            bytes_.size() - kLengthBytes, bytes_.size());
    const std::string_view header_text = text.substr(kLengthBytes, length);
    require(header_text.starts_with('{'), "header: found {}, expected a JSON object that starts with '{{'",
            header_text.empty() ? "nothing" : fmt::format("'{}'", printable(header_text, 16)));
    data_ = bytes_.subspan(kLengthBytes + length);
    file_.data_bytes_ = data_.size();
    return parse_json(header_text, file_.path_ + ": header", kHeaderDepth);
  }

  void read_metadata(const json& value) {
    require(value.is_object(), "{}: found {}, expected an object of strings", kMetadataKey, describe(value));
    for (const auto& [key, text] : value.items()) {
      require(text.is_string(), "{}: key '{}': found {}, expected a string", kMetadataKey, printable(key),
              describe(text));
      file_.metadata_.emplace(key, text.get<std::string>());
    }
  }

  void read_tensor(const std::string& name, const json& value) {
    require(value.is_object(), "tensor '{}': found {}, expected an object with dtype, shape and data_offsets",
            printable(name), describe(value));
    for (const auto& item : value.items()) {
      const bool known = item.key() == "dtype" || item.key() == "shape" || item.key() == "data_offsets";
      require_field(known, name, "keys", "'" + printable(item.key()) + "'",
                    "dtype, shape and data_offsets only");
    }
    Entry entry;
    const ElementType type = read_dtype(name, value);
    if (type.dtype) {
      entry.view.dtype = *type.dtype;
    } else {
      entry.unsupported = type.name;
    }
    entry.view.shape = read_shape(name, value);
    std::tie(entry.begin, entry.end) = read_offsets(name, value);
    const uint64_t expected = byte_size(name, entry.view.shape, type);
    if (entry.end - entry.begin != expected) {
      require_field(false, name, "data_offsets", fmt::format("{} bytes", entry.end - entry.begin),
                    fmt::format("{} bytes for {} of shape {}", expected, type.name,
                                printable(to_string(entry.view.shape))));
    }
    entry.view.data = data_.data() + entry.begin;
    file_.tensors_.emplace(name, std::move(entry));
  }

  const json& field(const std::string& name, const json& value, std::string_view key,
                    std::string_view expected) const {
    const auto at = value.find(key);
    require_field(at != value.end(), name, key, "nothing", expected);
    return *at;
  }

  ElementType read_dtype(const std::string& name, const json& value) const {
    constexpr std::string_view kExpected = "the name of an element type, such as \"F32\" or \"BF16\"";
    const json& dtype = field(name, value, "dtype", kExpected);
    if (dtype.is_string()) {
      for (const ElementType& type : kElementTypes) {
        if (dtype.get_ref<const std::string&>() == type.name) return type;
      }
    }
    require_field(false, name, "dtype", describe(dtype), kExpected);
    std::abort();
  }

  Shape read_shape(const std::string& name, const json& value) const {
    constexpr std::string_view kExpected = "an array of non-negative integers";
    const json& shape = field(name, value, "shape", kExpected);
    require_field(shape.is_array(), name, "shape", describe(shape), kExpected);
    Shape result;
    for (const json& size : shape) {
      const bool ok = size.is_number_unsigned() && std::in_range<int64_t>(size.get<uint64_t>());
      require_field(ok, name, fmt::format("shape[{}]", result.size()), describe(size),
                    "a non-negative integer");
      result.push_back(size.get<int64_t>());
    }
    return result;
  }

  std::pair<uint64_t, uint64_t> read_offsets(const std::string& name, const json& value) const {
    constexpr std::string_view kExpected = "two non-negative integers [begin, end]";
    const json& offsets = field(name, value, "data_offsets", kExpected);
    const bool ok = offsets.is_array() && offsets.size() == 2 && offsets[0].is_number_unsigned() &&
                    offsets[1].is_number_unsigned();
    require_field(ok, name, "data_offsets", describe(offsets), kExpected);
    const auto begin = offsets[0].get<uint64_t>();
    const auto end = offsets[1].get<uint64_t>();
    require_field(begin <= end, name, "data_offsets", describe(offsets), "begin not behind end");
    require_field(end <= data_.size(), name, "data_offsets", describe(offsets),
                  fmt::format("an end of at most {}, the bytes of data in the file", data_.size()));
    return {begin, end};
  }

  uint64_t byte_size(const std::string& name, const Shape& shape, const ElementType& type) const {
    // Every partial product has to fit, as in the format's own reader, and in int64_t for
    // TensorView::elements().
    int64_t bits = static_cast<int64_t>(type.bits);
    bool fits = true;
    for (int64_t size : shape) fits = fits && !__builtin_mul_overflow(bits, size, &bits);
    if (!fits) {
      require_field(false, name, "shape", printable(to_string(shape)), "a size below 2^63 bits");
    }
    require_field(bits % 8 == 0, name, "shape", fmt::format("{} bits", bits), "whole bytes");
    return static_cast<uint64_t>(bits) / 8;
  }

  void order_by_data() {
    for (const auto& [name, entry] : file_.tensors_) file_.names_.push_back(name);
    const auto place = [this](const std::string& name) {
      const Entry& entry = file_.tensors_.find(name)->second;
      return std::pair(entry.begin, entry.end);
    };
    std::stable_sort(file_.names_.begin(), file_.names_.end(),
                     [&](const std::string& a, const std::string& b) { return place(a) < place(b); });
  }

  void check_no_holes() const {
    uint64_t end = 0;
    std::string after = "the start of the data";
    for (const std::string& name : file_.names_) {
      const Entry& entry = file_.tensors_.find(name)->second;
      if (entry.begin != end) {
        require_field(false, name, "data_offsets",
                      fmt::format("begin {} ({})", entry.begin, entry.begin < end ? "an overlap" : "a hole"),
                      fmt::format("{}, after {}", end, after));
      }
      end = entry.end;
      after = "tensor '" + printable(name) + "'";
    }
    require(end == data_.size(), "data: found {} bytes, expected {}, where {} ends", data_.size(), end,
            file_.names_.empty() ? "a file without tensors" : after);
  }

  SafetensorsFile& file_;
  std::span<const std::byte> bytes_;
  std::span<const std::byte> data_;
};

SafetensorsFile SafetensorsFile::open(const std::string& path) {
  SafetensorsFile result;
  result.path_ = path;
  result.file_ = std::make_shared<const MappedFile>(path);
  Parser(result, result.file_->bytes()).run();
  return result;
}

SafetensorsFile SafetensorsFile::parse(std::span<const std::byte> bytes, std::string name) {
  SafetensorsFile result;
  result.path_ = std::move(name);
  Parser(result, bytes).run();
  return result;
}

const TensorView* SafetensorsFile::find(std::string_view name) const {
  const auto at = tensors_.find(name);
  if (at == tensors_.end()) return nullptr;
  const Entry& entry = at->second;
  check(entry.unsupported.empty(),
        "{}: tensor '{}': dtype: found {}, expected F32, F16, BF16, F64, I32, I64 or U8", path_,
        printable(name), entry.unsupported);
  return &entry.view;
}

const TensorView& SafetensorsFile::get(std::string_view name) const {
  const TensorView* view = find(name);
  check(view != nullptr, "{}: tensor '{}': found nothing of that name among {} tensors", path_,
        printable(name), tensors_.size());
  return *view;
}

void SafetensorsFile::advise(Access access) const {
  if (file_) file_->advise(access);
}

}  // namespace kilin::io
