// SPDX-License-Identifier: Apache-2.0
// Token files (.kbin): a text as the ids of one tokenizer, 2 or 4 bytes each, behind a header of 64 bytes
// that says which tokenizer it was. All numbers are little-endian:
//   0   8 bytes  "KILINTOK"
//   8   u32      version, 1
//   12  u32      bytes of an id: 2 for vocabularies of up to 65,536 tokens, else 4
//   16  u64      vocabulary: every id is below it
//   24  u64      tokenizer_hash() of the tokenizer
//   32  u64      number of ids
//   40  u64      number of documents
//   48  i32      [BOS], with which each document begins; -1: none
//   52  i32      [EOS], with which each document ends; -1: none
//   56  u64      FNV-1a of the 56 bytes before
//   64  ...      the ids
#pragma once
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>

#include "io/atomic_file.h"
#include "io/mapped_file.h"
#include "text/tokenizer.h"

namespace kilin::train {

struct TokenFileHeader {
  uint64_t vocab_size = 0;
  uint64_t tokenizer_hash = 0;
  uint64_t tokens = 0;
  uint64_t documents = 0;
  int32_t bos_id = -1;
  int32_t eos_id = -1;
};

// The same for two tokenizers with the same bytes under every id.
uint64_t tokenizer_hash(const text::Tokenizer& tokenizer);

class TokenFile {
 public:
  // Throws Error naming the file and the field when the header is damaged or does not fit the file's length.
  static TokenFile open(const std::string& path);
  // Parses bytes that the caller keeps alive; `name` stands for the path in errors.
  static TokenFile parse(std::span<const std::byte> bytes, std::string name);

  const std::string& path() const { return path_; }
  const TokenFileHeader& header() const { return header_; }
  uint64_t tokens() const { return header_.tokens; }
  // Copies `count` ids from `first` on. Throws Error for an id outside the vocabulary.
  void read(uint64_t first, size_t count, int32_t* out) const;

 private:
  std::string path_;
  std::shared_ptr<const io::MappedFile> file_;  // null for parse()
  TokenFileHeader header_;
  uint32_t id_bytes_ = 2;
  const std::byte* ids_ = nullptr;
};

// Writes a token file, which appears whole or not at all.
class TokenFileWriter {
 public:
  // The header's vocab_size, tokenizer_hash, bos_id and eos_id are taken, its counts are counted.
  TokenFileWriter(const std::string& path, const TokenFileHeader& header);
  // One document, with the marks at its ends that it is to have.
  void add_document(std::span<const int32_t> ids);
  const TokenFileHeader& header() const { return header_; }
  void commit();

 private:
  void flush();

  std::string path_;
  TokenFileHeader header_;
  io::AtomicFile file_;
  uint32_t id_bytes_;
  std::string buffer_;
};

}  // namespace kilin::train
