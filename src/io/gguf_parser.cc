// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <array>
#include <bit>
#include <filesystem>
#include <fstream>
#include <tuple>
#include <utility>

#include "base/error.h"
#include "io/ggml_types.h"
#include "io/gguf_contents.h"
#include "io/printable.h"

namespace kilin::io {
namespace {

constexpr uint64_t kMaxArrayElements = 100'000'000;  // an int8 takes 8 bytes of memory, a string 32
constexpr uint64_t kMaxAlignment = uint64_t{1} << 30;
constexpr uint64_t kMinValueBytes = 8 + 1 + 4 + 1;       // key, its length, type, value
constexpr uint64_t kMinTensorBytes = 8 + 1 + 4 + 4 + 8;  // name, its length, dimensions, type, offset
constexpr int64_t kMaxParts = 99'999;                    // what five digits in a name can count

constexpr size_t size_of(GgufType type) {
  switch (type) {
    case GgufType::kUint8:
    case GgufType::kInt8:
    case GgufType::kBool:
      return 1;
    case GgufType::kUint16:
    case GgufType::kInt16:
      return 2;
    case GgufType::kUint32:
    case GgufType::kInt32:
    case GgufType::kFloat32:
      return 4;
    default:  // 64 bits, or the length of a string
      return 8;
  }
}

// NAME-00002-of-00003.gguf of NAME-00001-of-00003.gguf; "" when the path does not end that way.
std::string path_of_part(const std::string& first, int64_t part, int64_t parts) {
  const std::string suffix = fmt::format("-{:05}-of-{:05}.gguf", 1, parts);
  if (!first.ends_with(suffix)) return "";
  return first.substr(0, first.size() - suffix.size()) + fmt::format("-{:05}-of-{:05}.gguf", part, parts);
}

}  // namespace

// Reads one file into Contents. Each check throws an Error that names file, place, found and expected.
class GgufFile::Parser {
 public:
  using Metadata = std::map<std::string, GgufValue, std::less<>>;

  // Maps and reads a whole file.
  static void add_file(Contents& contents, const std::string& path, Metadata& metadata);
  // Part `number`, from 2 on, of the split file whose first part the contents have.
  static void add_part(Contents& contents, int64_t number, int64_t parts);

  Parser(Contents& contents, const std::string& path, std::span<const std::byte> bytes)
      : contents_(contents), path_(path), bytes_(bytes) {}

  // The metadata lands in `metadata`, the tensors behind those that the contents already have.
  void run(Metadata& metadata) {
    read_header();
    for (uint64_t i = 0; i < values_; ++i) read_pair(metadata);
    read_alignment(metadata);
    require(tensors_ <= rest() / kMinTensorBytes,
            "tensors: found a count of {}, expected at most {} in the {} "
            "bytes behind the metadata",
            tensors_, rest() / kMinTensorBytes, rest());
    for (uint64_t i = 0; i < tensors_; ++i) read_tensor(i);
    place_tensors();
  }

 private:
  struct Extent {
    std::string name;
    uint64_t begin, bytes;  // 0 bytes of a type of unknown size
  };

  template <class... Args>
  void require(bool ok, fmt::format_string<Args...> format, Args&&... args) const {
    if (!ok) [[unlikely]]
      fail("{}: {}", path_, fmt::format(format, std::forward<Args>(args)...));
  }
  // As require(), with the name of what is being read put in front only when it is needed.
  template <class... Args>
  void require_here(bool ok, fmt::format_string<Args...> format, Args&&... args) const {
    if (!ok) [[unlikely]]
      fail("{}: {}: {}", path_, place_, fmt::format(format, std::forward<Args>(args)...));
  }

  uint64_t rest() const { return bytes_.size() - at_; }

  uint64_t read_unsigned(size_t size) {
    require_here(size <= rest(), "found the end of the file at byte {}, expected {} more bytes",
                 bytes_.size(), size - rest());
    uint64_t value = 0;
    for (size_t i = size; i-- > 0;) value = value << 8 | std::to_integer<uint64_t>(bytes_[at_ + i]);
    at_ += size;
    return value;
  }
  uint32_t read_uint32() { return static_cast<uint32_t>(read_unsigned(4)); }

  std::string read_string() {
    const uint64_t length = read_unsigned(8);
    require_here(length <= rest(), "found a string of {} bytes, expected at most the {} left in the file",
                 length, rest());
    std::string text(reinterpret_cast<const char*>(bytes_.data()) + at_, length);
    at_ += length;
    return text;
  }

  void read_header() {
    const std::string_view text(reinterpret_cast<const char*>(bytes_.data()), bytes_.size());
    require(!text.starts_with("version https://git-lfs.github.com/"),
            "found a Git LFS pointer, expected the file itself (run: git lfs pull)");
    require(text.starts_with(kGgufMagic), "magic: found {}, expected 'GGUF'",
            text.empty() ? "nothing" : fmt::format("'{}'", printable(text, kGgufMagic.size())));
    at_ = kGgufMagic.size();
    place_ = "header";
    const uint32_t version = read_uint32();
    require((version & 0xffff) != 0 || version == 0,
            "version: found {} in reverse byte order (a big-endian file), expected a little-endian file",
            version >> 24);
    require(version == 2 || version == kGgufVersion, "version: found {}, expected 2 or 3", version);
    tensors_ = read_unsigned(8);
    values_ = read_unsigned(8);
    require(values_ <= rest() / kMinValueBytes,
            "metadata: found a count of {}, expected at most {} in the {} bytes behind the header", values_,
            rest() / kMinValueBytes, rest());
  }

  void read_pair(Metadata& metadata) {
    place_ = "metadata";
    std::string key = read_string();
    require_here(!key.empty(), "found an empty key, expected a name");
    place_ = fmt::format("key '{}'", printable(key));
    const GgufType type = read_type();
    GgufValue value = type == GgufType::kArray ? GgufValue(read_array()) : read_value(type);
    require_here(metadata.emplace(std::move(key), std::move(value)).second, "found twice, expected once");
  }

  GgufType read_type() {
    const uint32_t type = read_uint32();
    require_here(type <= static_cast<uint32_t>(GgufType::kFloat64),
                 "found a value of type {}, expected a type from 0 to {}", type,
                 static_cast<uint32_t>(GgufType::kFloat64));
    return static_cast<GgufType>(type);
  }

  int64_t read_integer(GgufType type) {
    const size_t size = size_of(type);
    const uint64_t value = read_unsigned(size);
    if (type == GgufType::kUint64) {
      require_here(std::in_range<int64_t>(value), "found {}, expected an integer below 2^63", value);
      return static_cast<int64_t>(value);
    }
    const bool is_signed = type == GgufType::kInt8 || type == GgufType::kInt16 || type == GgufType::kInt32;
    const unsigned shift = is_signed ? 64 - 8 * static_cast<unsigned>(size) : 0;
    return static_cast<int64_t>(value << shift) >> shift;
  }

  double read_float(GgufType type) {
    if (type == GgufType::kFloat32) return static_cast<double>(std::bit_cast<float>(read_uint32()));
    return std::bit_cast<double>(read_unsigned(8));
  }

  bool read_bool() {
    const uint64_t value = read_unsigned(1);
    require_here(value <= 1, "found the bool {}, expected 0 or 1", value);
    return value == 1;
  }

  GgufValue read_value(GgufType type) {
    switch (type) {
      case GgufType::kFloat32:
      case GgufType::kFloat64:
        return read_float(type);
      case GgufType::kBool:
        return read_bool();
      case GgufType::kString:
        return read_string();
      default:
        return read_integer(type);
    }
  }

  GgufArray read_array() {
    const GgufType type = read_type();
    require_here(type != GgufType::kArray, "found an array of arrays, expected an array of plain values");
    const uint64_t count = read_unsigned(8);
    const uint64_t room = std::min(rest() / size_of(type), kMaxArrayElements);
    require_here(count <= room, "found an array of {} elements, expected at most {} ({} bytes are left)",
                 count, room, rest());
    const auto fill = [&]<class T>(std::vector<T> values, const auto& read) {
      values.reserve(count);
      for (uint64_t i = 0; i < count; ++i) values.push_back(read());
      return GgufArray(std::move(values));
    };
    switch (type) {
      case GgufType::kFloat32:
      case GgufType::kFloat64:
        return fill(std::vector<double>(), [&] { return read_float(type); });
      case GgufType::kBool:
        return fill(std::vector<bool>(), [&] { return read_bool(); });
      case GgufType::kString:
        return fill(std::vector<std::string>(), [&] { return read_string(); });
      default:
        return fill(std::vector<int64_t>(), [&] { return read_integer(type); });
    }
  }

  void read_alignment(const Metadata& metadata) {
    const auto at = metadata.find(kGgufAlignmentKey);
    if (at == metadata.end()) return;
    const auto* found = std::get_if<int64_t>(&at->second);
    place_ = fmt::format("key '{}'", kGgufAlignmentKey);
    require_here(found != nullptr, "found {}, expected an integer", kind_of(at->second));
    const bool ok = *found > 0 && static_cast<uint64_t>(*found) <= kMaxAlignment &&
                    std::has_single_bit(static_cast<uint64_t>(*found));
    require_here(ok, "found {}, expected a power of two up to {}", *found, kMaxAlignment);
    alignment_ = static_cast<uint64_t>(*found);
  }

  void read_tensor(uint64_t index) {
    place_ = fmt::format("tensor {} of {}", index + 1, tensors_);
    std::string name = read_string();
    require_here(!name.empty(), "found an empty name, expected a name");
    place_ = fmt::format("tensor '{}'", printable(name));
    Contents::Tensor tensor;
    tensor.view.shape = read_shape();
    const uint32_t id = read_uint32();
    const uint64_t bytes = read_element_type(id, tensor);
    const uint64_t offset = read_unsigned(8);
    require_here(offset % alignment_ == 0, "offset: found {}, expected a multiple of the alignment {}",
                 offset, alignment_);
    require_here(contents_.tensors.emplace(name, std::move(tensor)).second, "found twice, expected once");
    contents_.names.push_back(name);
    contents_.data_bytes += bytes;
    extents_.push_back({std::move(name), offset, bytes});
  }

  // In Kilin's order: the file has the fastest dimension first.
  Shape read_shape() {
    const uint32_t dims = read_uint32();
    require_here(dims <= kGgmlMaxDims, "shape: found {} dimensions, expected at most {}", dims, kGgmlMaxDims);
    Shape shape(dims);
    for (uint32_t i = 0; i < dims; ++i) {
      const uint64_t size = read_unsigned(8);
      require_here(size > 0 && std::in_range<int64_t>(size),
                   "shape: found {} as dimension {}, expected a size from 1 to 2^63 - 1", size, i);
      shape[dims - 1 - i] = static_cast<int64_t>(size);
    }
    return shape;
  }

  // Sets type and dtype; returns the bytes of the tensor, or 0 where they are not known.
  uint64_t read_element_type(uint32_t id, Contents::Tensor& tensor) const {
    if (id >= kGgmlTypes.size()) {
      tensor.type = fmt::format("type {}", id);
      return 0;
    }
    const GgmlType& type = kGgmlTypes[id];
    tensor.type = type.name;
    tensor.readable = type.dtype.has_value();
    if (tensor.readable) tensor.view.dtype = *type.dtype;
    const Shape& shape = tensor.view.shape;
    const int64_t row = shape.empty() ? 1 : shape.back();
    require_here(row % type.block == 0, "shape: found {} with rows of {}, expected a multiple of {} for {}",
                 to_string(shape), row, type.block, type.name);
    int64_t bytes = static_cast<int64_t>(type.block_bytes);
    int64_t elements = 1;
    bool fits = !__builtin_mul_overflow(bytes, row / type.block, &bytes);
    for (size_t i = 0; i < shape.size(); ++i) {
      fits = fits && !__builtin_mul_overflow(elements, shape[i], &elements);
      if (i + 1 < shape.size()) fits = fits && !__builtin_mul_overflow(bytes, shape[i], &bytes);
    }
    require_here(fits, "shape: found {} of {}, expected a size below 2^63", to_string(shape), type.name);
    return static_cast<uint64_t>(bytes);
  }

  // Offsets count from the first aligned byte behind the table of tensors.
  void place_tensors() {
    const uint64_t begin = (at_ + alignment_ - 1) / alignment_ * alignment_;
    const uint64_t room = begin <= bytes_.size() ? bytes_.size() - begin : 0;
    for (const Extent& extent : extents_) {
      const bool inside = extent.begin <= room && extent.bytes <= room - extent.begin;
      if (!inside) {
        fail(
            "{}: tensor '{}': data: found {} bytes at offset {}, expected them within the {} bytes of data "
            "in "
            "the file",
            path_, printable(extent.name), extent.bytes, extent.begin, room);
      }
      contents_.tensors.find(extent.name)->second.view.data = bytes_.data() + begin + extent.begin;
    }
    std::sort(extents_.begin(), extents_.end(), [](const Extent& a, const Extent& b) {
      return std::tie(a.begin, a.bytes) < std::tie(b.begin, b.bytes);
    });
    for (size_t i = 1; i < extents_.size(); ++i) {
      const Extent &before = extents_[i - 1], &extent = extents_[i];
      if (extent.begin < before.begin + before.bytes) {
        fail("{}: tensor '{}': offset: found {} (an overlap), expected at least {}, where tensor '{}' ends",
             path_, printable(extent.name), extent.begin, before.begin + before.bytes,
             printable(before.name));
      }
    }
  }

  Contents& contents_;
  const std::string& path_;
  std::span<const std::byte> bytes_;
  uint64_t at_ = 0;
  std::string place_;  // what is being read, for errors
  uint64_t tensors_ = 0, values_ = 0;
  uint64_t alignment_ = kGgufAlignment;
  std::vector<Extent> extents_;
};

bool GgufFile::is_gguf(const std::string& path) {
  std::error_code ignored;
  if (!std::filesystem::is_regular_file(path, ignored)) return false;  // opening a FIFO would wait
  std::array<char, kGgufMagic.size()> magic{};
  std::ifstream file(path, std::ios::binary);
  file.read(magic.data(), magic.size());
  return file.good() && std::string_view(magic.data(), magic.size()) == kGgufMagic;
}

GgufFile GgufFile::parse(std::span<const std::byte> bytes, std::string name) {
  auto contents = std::make_shared<Contents>();
  contents->path = std::move(name);
  contents->paths = {contents->path};
  Parser(*contents, contents->path, bytes).run(contents->metadata);
  return GgufFile(std::move(contents));
}

void GgufFile::Parser::add_file(Contents& contents, const std::string& path, Metadata& metadata) {
  contents.paths.push_back(path);
  contents.files.push_back(std::make_unique<const MappedFile>(path));
  Parser(contents, path, contents.files.back()->bytes()).run(metadata);
}

void GgufFile::Parser::add_part(Contents& contents, int64_t number, int64_t parts) {
  const std::string path = path_of_part(contents.path, number, parts);
  std::error_code error;
  check(std::filesystem::exists(path, error), "{}: found no such file, expected part {} of {} beside '{}'",
        path, number, parts, contents.path);
  auto own = std::make_shared<Contents>();  // for its metadata: the tensors go to the first part's
  own->path = path;
  add_file(contents, path, own->metadata);
  const GgufFile part(std::move(own));
  check(part.get_int("split.no") == number - 1 && part.get_int("split.count") == parts,
        "{}: keys 'split.no' and 'split.count': found {} and {}, expected {} and {}", path,
        part.get_int("split.no"), part.get_int("split.count"), number - 1, parts);
}

GgufFile GgufFile::open(const std::string& path) {
  auto contents = std::make_shared<Contents>();
  contents->path = path;
  Parser::add_file(*contents, path, contents->metadata);
  GgufFile file(contents);
  const int64_t parts = file.get_int("split.count", 1);
  if (parts <= 1) return file;

  const int64_t index = file.get_int("split.no", 0);
  check(index == 0, "{}: key 'split.no': found {}, expected 0: the first of the {} parts of a split file",
        path, index, parts);
  check(parts <= kMaxParts && !path_of_part(path, 1, parts).empty(),
        "{}: found the first of {} parts, expected a name that ends in '-00001-of-{:05}.gguf'", path, parts,
        parts);
  for (int64_t number = 2; number <= parts; ++number) Parser::add_part(*contents, number, parts);
  const auto tensors = static_cast<int64_t>(file.names().size());
  check(file.get_int("split.tensors.count", tensors) == tensors,
        "{}: key 'split.tensors.count': found {}, expected {}, the number of tensors in all parts", path,
        file.get_int("split.tensors.count", tensors), tensors);
  return file;
}

}  // namespace kilin::io
