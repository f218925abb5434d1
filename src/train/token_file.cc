// SPDX-License-Identifier: Apache-2.0
#include "train/token_file.h"

#include <bit>
#include <cstring>
#include <string_view>
#include <utility>

#include "base/error.h"

namespace kilin::train {
namespace {

static_assert(std::endian::native == std::endian::little, "token files are written as they lie in memory");

constexpr std::string_view kMagic = "KILINTOK";
constexpr uint32_t kVersion = 1;
constexpr size_t kHeaderBytes = 64;
constexpr size_t kHashedBytes = 56;
constexpr uint64_t kMaxVocabulary = uint64_t{1} << 24;
constexpr uint64_t kSmallVocabulary = uint64_t{1} << 16;
constexpr size_t kBufferBytes = size_t{1} << 20;

uint64_t fnv1a(std::string_view bytes, uint64_t hash = 0xcbf29ce484222325ULL) {
  for (const char c : bytes) hash = (hash ^ static_cast<unsigned char>(c)) * 0x100000001b3ULL;
  return hash;
}

struct Bytes {
  char at[kHeaderBytes] = {};
  template <class T>
  void put(size_t offset, T value) {
    std::memcpy(at + offset, &value, sizeof value);
  }
  template <class T>
  T get(size_t offset) const {
    T value;
    std::memcpy(&value, at + offset, sizeof value);
    return value;
  }
};

Bytes encode_header(const TokenFileHeader& header, uint32_t id_bytes) {
  Bytes bytes;
  std::memcpy(bytes.at, kMagic.data(), kMagic.size());
  bytes.put<uint32_t>(8, kVersion);
  bytes.put<uint32_t>(12, id_bytes);
  bytes.put<uint64_t>(16, header.vocab_size);
  bytes.put<uint64_t>(24, header.tokenizer_hash);
  bytes.put<uint64_t>(32, header.tokens);
  bytes.put<uint64_t>(40, header.documents);
  bytes.put<int32_t>(48, header.bos_id);
  bytes.put<int32_t>(52, header.eos_id);
  bytes.put<uint64_t>(56, fnv1a({bytes.at, kHashedBytes}));
  return bytes;
}

uint32_t id_bytes_for(uint64_t vocab_size) { return vocab_size <= kSmallVocabulary ? 2 : 4; }

void check_mark(const std::string& path, const char* field, int32_t id, uint64_t vocab_size) {
  check(id >= -1 && (id < 0 || static_cast<uint64_t>(id) < vocab_size),
        "{}: field '{}': found {}, expected -1 or an id below {}", path, field, id, vocab_size);
}

}  // namespace

uint64_t tokenizer_hash(const text::Tokenizer& tokenizer) {
  uint64_t hash = fnv1a("kilin tokenizer");
  for (int32_t id = 0; id < tokenizer.vocab_size(); ++id) {
    const std::string_view bytes = tokenizer.token_bytes(id);
    const uint64_t size = bytes.size() * 2 + (tokenizer.is_special(id) ? 1 : 0);
    hash = fnv1a({reinterpret_cast<const char*>(&size), sizeof size}, hash);
    hash = fnv1a(bytes, hash);
  }
  return hash;
}

TokenFile TokenFile::open(const std::string& path) {
  auto file = std::make_shared<const io::MappedFile>(path);
  TokenFile result = parse(file->bytes(), path);
  result.file_ = std::move(file);
  return result;
}

TokenFile TokenFile::parse(std::span<const std::byte> content, std::string name) {
  TokenFile file;
  file.path_ = std::move(name);
  const std::string& path = file.path_;
  check(content.size() >= kHeaderBytes, "{}: found {} bytes, expected a token file's header of {}", path,
        content.size(), kHeaderBytes);
  Bytes bytes;
  std::memcpy(bytes.at, content.data(), kHeaderBytes);
  check(std::string_view(bytes.at, kMagic.size()) == kMagic,
        "{}: is no token file (made by 'kilin tokenize'): it does not begin with {}", path, kMagic);
  const auto version = bytes.get<uint32_t>(8);
  check(version == kVersion, "{}: field 'version': found {}, expected {}", path, version, kVersion);
  check(bytes.get<uint64_t>(56) == fnv1a({bytes.at, kHashedBytes}),
        "{}: the header is damaged: its check sum differs", path);
  TokenFileHeader& header = file.header_;
  header.vocab_size = bytes.get<uint64_t>(16);
  header.tokenizer_hash = bytes.get<uint64_t>(24);
  header.tokens = bytes.get<uint64_t>(32);
  header.documents = bytes.get<uint64_t>(40);
  header.bos_id = bytes.get<int32_t>(48);
  header.eos_id = bytes.get<int32_t>(52);
  check(header.vocab_size >= 1 && header.vocab_size <= kMaxVocabulary,
        "{}: field 'vocabulary': found {}, expected 1 to {}", path, header.vocab_size, kMaxVocabulary);
  file.id_bytes_ = bytes.get<uint32_t>(12);
  check(file.id_bytes_ == id_bytes_for(header.vocab_size),
        "{}: field 'bytes of an id': found {}, expected {} for {} tokens", path, file.id_bytes_,
        id_bytes_for(header.vocab_size), header.vocab_size);
  check_mark(path, "[BOS]", header.bos_id, header.vocab_size);
  check_mark(path, "[EOS]", header.eos_id, header.vocab_size);
  const size_t body = content.size() - kHeaderBytes;
  check(header.tokens == body / file.id_bytes_ && body % file.id_bytes_ == 0,
        "{}: found {} bytes of ids, expected {} ids of {} bytes (is the file cut off?)", path, body,
        header.tokens, file.id_bytes_);
  file.ids_ = content.data() + kHeaderBytes;
  return file;
}

void TokenFile::read(uint64_t first, size_t count, int32_t* out) const {
  KILIN_ASSERT(first + count <= header_.tokens);
  const std::byte* from = ids_ + first * id_bytes_;
  for (size_t i = 0; i < count; ++i, from += id_bytes_) {
    uint32_t id = 0;
    std::memcpy(&id, from, id_bytes_);
    if (id >= header_.vocab_size) {
      fail("{}: token {}: found id {}, expected one below {}", path_, first + i, id, header_.vocab_size);
    }
    out[i] = static_cast<int32_t>(id);
  }
}

TokenFileWriter::TokenFileWriter(const std::string& path, const TokenFileHeader& header)
    : path_(path), header_(header), file_(path), id_bytes_(id_bytes_for(header.vocab_size)) {
  header_.tokens = header_.documents = 0;
  const Bytes space;
  file_.write(space.at, kHeaderBytes);
}

void TokenFileWriter::add_document(std::span<const int32_t> ids) {
  for (const int32_t id : ids) {
    check(id >= 0 && static_cast<uint64_t>(id) < header_.vocab_size, "{}: found id {}, expected one below {}",
          path_, id, header_.vocab_size);
    const auto value = static_cast<uint32_t>(id);
    buffer_.append(reinterpret_cast<const char*>(&value), id_bytes_);
  }
  header_.tokens += ids.size();
  ++header_.documents;
  if (buffer_.size() >= kBufferBytes) flush();
}

void TokenFileWriter::flush() {
  file_.write(buffer_);
  buffer_.clear();
}

void TokenFileWriter::commit() {
  flush();
  const Bytes header = encode_header(header_, id_bytes_);
  file_.rewrite(0, header.at, kHeaderBytes);
  file_.commit();
}

}  // namespace kilin::train
