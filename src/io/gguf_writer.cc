// SPDX-License-Identifier: Apache-2.0
#include "io/gguf_writer.h"

#include <algorithm>
#include <bit>
#include <set>
#include <string>
#include <utility>

#include "base/error.h"
#include "io/atomic_file.h"
#include "io/ggml_types.h"
#include "io/printable.h"

namespace kilin::io {
namespace {

constexpr size_t kMaxName = 63;  // GGML_MAX_NAME less its NUL: ggml refuses longer names of tensors

void put(std::string& out, uint64_t value, size_t size) {
  for (size_t i = 0; i < size; ++i) out += static_cast<char>(value >> (8 * i) & 0xff);
}
void put(std::string& out, GgufType type) { put(out, static_cast<uint32_t>(type), 4); }
void put(std::string& out, std::string_view text) {
  put(out, text.size(), 8);
  out += text;
}

uint64_t aligned(uint64_t size) { return (size + kGgufAlignment - 1) / kGgufAlignment * kGgufAlignment; }

const GgmlType* ggml_type_of(Dtype dtype) {
  const auto* at = std::find_if(kGgmlTypes.begin(), kGgmlTypes.end(),
                                [dtype](const GgmlType& type) { return type.dtype == dtype; });
  return at == kGgmlTypes.end() ? nullptr : at;
}

}  // namespace

struct GgufWriter::Impl {
  struct Tensor {
    std::string name;
    uint64_t bytes;
  };

  explicit Impl(std::string file_path) : path(std::move(file_path)), file(path) {}

  // Where the value of a key goes.
  std::string& value_of(std::string_view key, GgufType type) {
    check(!started, "{}: key '{}': added behind the first data, expected all metadata before", path,
          printable(key));
    check(!key.empty(), "{}: found an empty key, expected a name", path);
    check(keys.emplace(key).second, "{}: key '{}': added twice, expected once", path, printable(key));
    put(metadata, key);
    put(metadata, type);
    return metadata;
  }
  std::string& array_of(std::string_view key, GgufType type, size_t count) {
    std::string& out = value_of(key, GgufType::kArray);
    put(out, type);
    put(out, count, 8);
    return out;
  }

  void start() {
    if (std::exchange(started, true)) return;
    std::string head(kGgufMagic);
    put(head, kGgufVersion, 4);
    put(head, tensors.size(), 8);
    put(head, keys.size(), 8);
    file.write(head);
    file.write(metadata);
    file.write(table);
    pad();
  }
  void pad() {
    const uint64_t size = file.written();
    file.write(std::string(aligned(size) - size, '\0'));
  }

  std::string path;
  AtomicFile file;
  std::set<std::string, std::less<>> keys, names;
  std::string metadata, table;  // as they stand in the file
  std::vector<Tensor> tensors;
  uint64_t data_bytes = 0, padded_bytes = 0;
  bool started = false;
  size_t current = 0;          // the tensor that write() fills next
  uint64_t current_bytes = 0;  // of it so far
};

GgufWriter::GgufWriter(std::string path) : impl_(std::make_unique<Impl>(std::move(path))) {}
GgufWriter::~GgufWriter() = default;

void GgufWriter::add_uint32(std::string_view key, uint32_t value) {
  check(key != kGgufAlignmentKey || value == kGgufAlignment, "{}: key '{}': found {}, expected {}",
        impl_->path, key, value, kGgufAlignment);
  put(impl_->value_of(key, GgufType::kUint32), value, 4);
}

void GgufWriter::add_float32(std::string_view key, float value) {
  put(impl_->value_of(key, GgufType::kFloat32), std::bit_cast<uint32_t>(value), 4);
}

void GgufWriter::add_bool(std::string_view key, bool value) {
  put(impl_->value_of(key, GgufType::kBool), value ? 1 : 0, 1);
}

void GgufWriter::add_string(std::string_view key, std::string_view value) {
  put(impl_->value_of(key, GgufType::kString), value);
}

void GgufWriter::add_int32s(std::string_view key, const std::vector<int32_t>& values) {
  std::string& out = impl_->array_of(key, GgufType::kInt32, values.size());
  for (const int32_t value : values) put(out, static_cast<uint32_t>(value), 4);
}

void GgufWriter::add_float32s(std::string_view key, const std::vector<float>& values) {
  std::string& out = impl_->array_of(key, GgufType::kFloat32, values.size());
  for (const float value : values) put(out, std::bit_cast<uint32_t>(value), 4);
}

void GgufWriter::add_strings(std::string_view key, const std::vector<std::string>& values) {
  std::string& out = impl_->array_of(key, GgufType::kString, values.size());
  for (const std::string& value : values) put(out, std::string_view(value));
}

void GgufWriter::add_tensor(std::string name, Dtype dtype, Shape shape) {
  const std::string place = fmt::format("{}: tensor '{}'", impl_->path, printable(name));
  check(!impl_->started, "{}: added behind the first data, expected all tensors before", place);
  check(!name.empty() && name.size() <= kMaxName, "{}: found a name of {} bytes, expected 1 to {}", place,
        name.size(), kMaxName);
  const GgmlType* type = ggml_type_of(dtype);
  check(type != nullptr, "{}: dtype: found {}, which GGUF does not have", place, dtype_name(dtype));
  const int64_t block = dtype_block(dtype);
  check(!shape.empty() && shape.size() <= kGgmlMaxDims, "{}: shape: found {} dimensions, expected 1 to {}",
        place, shape.size(), kGgmlMaxDims);
  auto bytes = static_cast<int64_t>(dtype_traits(dtype).block_bytes);
  bool fits = shape.back() % block == 0;
  for (size_t i = 0; i < shape.size(); ++i) {
    const int64_t size = i + 1 < shape.size() ? shape[i] : shape[i] / block;
    fits = fits && size > 0 && !__builtin_mul_overflow(bytes, size, &bytes);
  }
  check(fits,
        "{}: shape: found {}, expected positive sizes, rows of a multiple of {} and less than 2^63 bytes",
        place, to_string(shape), block);
  check(impl_->names.insert(name).second, "{}: added twice, expected once", place);

  std::string& table = impl_->table;
  put(table, std::string_view(name));
  put(table, shape.size(), 4);
  for (size_t i = shape.size(); i-- > 0;) put(table, static_cast<uint64_t>(shape[i]), 8);
  put(table, type->id, 4);
  put(table, impl_->padded_bytes, 8);
  impl_->data_bytes += static_cast<uint64_t>(bytes);
  impl_->padded_bytes += aligned(static_cast<uint64_t>(bytes));
  impl_->tensors.push_back({std::move(name), static_cast<uint64_t>(bytes)});
}

void GgufWriter::write(const void* data, size_t size) {
  Impl& impl = *impl_;
  impl.start();
  if (size == 0) return;
  check(impl.current < impl.tensors.size(),
        "{}: found {} bytes of data behind the last tensor, expected none", impl.path, size);
  const Impl::Tensor& tensor = impl.tensors[impl.current];
  check(size <= tensor.bytes - impl.current_bytes,
        "{}: tensor '{}': found {} bytes of data behind the first {}, expected at most {} more", impl.path,
        printable(tensor.name), size, impl.current_bytes, tensor.bytes - impl.current_bytes);
  impl.file.write(data, size);
  impl.current_bytes += size;
  if (impl.current_bytes == tensor.bytes) {
    impl.pad();
    ++impl.current;
    impl.current_bytes = 0;
  }
}

uint64_t GgufWriter::data_bytes() const { return impl_->data_bytes; }

void GgufWriter::commit() {
  Impl& impl = *impl_;
  impl.start();
  if (impl.current < impl.tensors.size()) {
    const Impl::Tensor& tensor = impl.tensors[impl.current];
    fail("{}: tensor '{}': found {} bytes of data, expected {}", impl.path, printable(tensor.name),
         impl.current_bytes, tensor.bytes);
  }
  impl.file.commit();
}

}  // namespace kilin::io
