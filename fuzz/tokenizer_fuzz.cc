// SPDX-License-Identifier: Apache-2.0
// Everything in text/ that reads files or prompts: whatever the bytes, nothing but kilin::Error may come out.
//
//   clang++ -std=c++20 -g -O1 -fsanitize=fuzzer,address,undefined -Isrc fuzz/tokenizer_fuzz.cc src/text/*.cc
//   ...
#include <cstdlib>
#include <string>
#include <string_view>
#include <vector>

#include "base/error.h"
#include "text/split_pattern.h"
#include "text/stream_decoder.h"
#include "text/tokenizer.h"
#include "text/utf8.h"

namespace {

using kilin::text::SplitPattern;
using kilin::text::Tokenizer;

void require(bool holds) {
  if (!holds) std::abort();
}

// A tokenizer of the 256 bytes and a few words, in tiktoken's format.
std::string small_ranks() {
  static constexpr char kDigits[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
  std::string text;
  for (int byte = 0; byte < 256; ++byte) {
    text += kDigits[byte >> 2];
    text += kDigits[(byte & 3) << 4];
    text += "== " + std::to_string(byte) + "\n";
  }
  return text + "YWI= 256\nYWJj 257\nIGE= 258\nICA= 259\n5Lit 260\n";
}

void use(const Tokenizer& tokenizer, std::string_view text) {
  static_cast<void>(tokenizer.encode(text, {.parse_special = false}));
  const std::vector<int32_t> ids = tokenizer.encode(text);
  for (const int32_t id : ids) require(id >= 0 && id < tokenizer.vocab_size());
}

void round_trip(std::string_view text) {
  static const Tokenizer tokenizer =
      Tokenizer::from_tiktoken(small_ranks(), R"({"tokenizer_class": "TikTokenTokenizer"})");
  use(tokenizer, text);
  const std::vector<int32_t> ids = tokenizer.encode(text);
  require(tokenizer.decode(ids) == text);
  kilin::text::StreamDecoder stream(tokenizer, false);
  std::string streamed;
  for (const int32_t id : ids) streamed += stream.push(id);
  require(streamed + stream.flush() == text);
}

void stream_any_ids(std::string_view bytes) {
  static const Tokenizer tokenizer = Tokenizer::from_tiktoken(small_ranks());
  kilin::text::StreamDecoder stream(tokenizer, false);
  std::vector<int32_t> ids;
  std::string streamed;
  for (const char byte : bytes) {
    ids.push_back(static_cast<uint8_t>(byte));
    const std::string part = stream.push(ids.back());
    require(kilin::text::find_invalid_utf8(part) == std::string_view::npos);
    streamed += part;
  }
  require(streamed + stream.flush() == kilin::text::lossy_utf8(tokenizer.decode(ids)));
}

void split(std::string_view input) {
  const size_t cut = input.find('\n');
  const SplitPattern pattern(input.substr(0, cut));
  const std::string text =
      kilin::text::lossy_utf8(cut == std::string_view::npos ? "ab 1 中" : input.substr(cut));
  std::vector<std::string_view> pieces;
  pattern.split(text, pieces);
  size_t total = 0;
  for (const std::string_view piece : pieces) total += piece.size();
  require(total == text.size());
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  if (size == 0) return 0;
  const std::string_view input(reinterpret_cast<const char*>(data) + 1, size - 1);
  try {
    switch (data[0] % 5) {
      case 0:
        use(Tokenizer::from_tokenizer_json(input), "Hello ab, 中文  1234's");
        break;
      case 1: {
        const size_t cut = input.find('{');
        use(Tokenizer::from_tiktoken(input.substr(0, cut),
                                     cut == std::string_view::npos ? std::string_view() : input.substr(cut)),
            "Hello ab, 中文  1234's");
        break;
      }
      case 2:
        split(input);
        break;
      case 3:
        round_trip(input);
        break;
      default:
        stream_any_ids(input);
    }
  } catch (const kilin::Error&) {
  }
  return 0;
}
