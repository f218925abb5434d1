// SPDX-License-Identifier: Apache-2.0
// Text to token ids and back, for byte-level BPE as tokenizer.json (Hugging Face tokenizers) and
// tiktoken.model describe it: the same ids as those libraries on any UTF-8.
#pragma once
#include <cstdint>
#include <filesystem>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "text/added_tokens.h"
#include "text/byte_pair_encoder.h"
#include "text/split_pattern.h"

namespace kilin::io {
class GgufFile;
}

namespace kilin::text {

// The tokens that a model gives a role, by their text; empty for none.
struct NamedTokens {
  std::string bos, eos, pad, unk;
};

// What a tokenizer is made of, whichever file it came from.
struct TokenizerParts {
  std::vector<std::string> tokens;  // bytes of each id; an empty one is a hole
  std::vector<Merge> merges;
  bool whole_first = true;                  // see BytePairEncoder
  std::vector<std::string> split_patterns;  // applied one after the other
  std::vector<AddedToken> added;
  NamedTokens named;
  bool cut_long_text = false;  // Kimi's TikTokenTokenizer: see text/long_text.h
};

struct EncodeOptions {
  bool parse_special = true;  // false: the text of a special token is ordinary text
};

// Never changes after its construction; every method may be called from several threads.
class Tokenizer {
 public:
  // The directory's tokenizer.json or else its tiktoken.model, with tokenizer_config.json and
  // special_tokens_map.json for the named tokens. Error when there is neither.
  static Tokenizer load(const std::filesystem::path& model_dir);
  static Tokenizer load_tokenizer_json(const std::filesystem::path& path);
  static Tokenizer load_tiktoken(const std::filesystem::path& path,
                                 const std::filesystem::path& tokenizer_config_path);
  // The same before it becomes a tokenizer, for writing it in another format (text/gguf_tokenizer.h).
  static TokenizerParts load_parts(const std::filesystem::path& model_dir);

  // The same from memory. `config` is the text of a tokenizer_config.json, or empty.
  static Tokenizer from_tokenizer_json(std::string_view json, std::string_view config = {});
  static Tokenizer from_tiktoken(std::string_view ranks, std::string_view config = {});
  // Of the metadata of a GGUF file, see text/gguf_tokenizer.h.
  static Tokenizer from_gguf(const io::GgufFile& file);

  explicit Tokenizer(TokenizerParts parts);

  // Adds no token that the text does not have. Error naming the byte offset for invalid UTF-8.
  std::vector<int32_t> encode(std::string_view text, EncodeOptions options = {}) const;

  // The tokens' bytes one after the other, which need not be UTF-8. Error for an id outside the vocabulary.
  std::string decode(std::span<const int32_t> ids, bool skip_special = false) const;
  std::string_view token_bytes(int32_t id) const;  // empty for an id without a token below vocab_size()

  int32_t vocab_size() const { return vocab_size_; }  // 1 + the highest id
  // By the token's bytes (" the", not the "Ġthe" of the file); an added token goes first.
  std::optional<int32_t> token_to_id(std::string_view bytes) const;
  bool is_special(int32_t id) const;

  std::optional<int32_t> bos_id() const { return bos_; }
  std::optional<int32_t> eos_id() const { return eos_; }
  std::optional<int32_t> pad_id() const { return pad_; }
  std::optional<int32_t> unk_id() const { return unk_; }

 private:
  void encode_added(std::string_view text, bool parse_special, std::vector<int32_t>& ids) const;
  void encode_ordinary(std::string_view text, std::vector<int32_t>& ids) const;
  const AddedToken* added(int32_t id) const;
  std::optional<int32_t> named_id(std::string_view text) const;
  void check_id(int32_t id) const;

  std::shared_ptr<const Vocabulary> vocabulary_;  // without the tokens that are only added ones
  BytePairEncoder encoder_;
  std::vector<SplitPattern> patterns_;
  std::vector<AddedToken> added_;  // by id
  AddedTokenFinder exact_, normalized_;
  bool cut_long_text_;
  int32_t vocab_size_;
  std::optional<int32_t> bos_, eos_, pad_, unk_;
};

}  // namespace kilin::text
