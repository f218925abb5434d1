// SPDX-License-Identifier: Apache-2.0
#include "text/tokenizer.h"

#include <gtest/gtest.h>

#include <chrono>
#include <cstdlib>
#include <random>

#include "base/error.h"
#include "text/file.h"
#include "text/json_fields.h"
#include "text/stream_decoder.h"
#include "text/utf8.h"

namespace kilin::text {
namespace {

const std::filesystem::path kSource = KILIN_SOURCE_DIR;
const std::filesystem::path kModel = kSource / "models/kilin-docs-10m";

const Tokenizer& from_json() {
  static const Tokenizer tokenizer = Tokenizer::load(kModel);
  return tokenizer;
}

const Tokenizer& from_ranks() {
  static const Tokenizer tokenizer =
      Tokenizer::load_tiktoken(kModel / "tiktoken.model", kModel / "tokenizer_config.json");
  return tokenizer;
}

Json read_cases(const std::filesystem::path& path) { return parse_json(read_file(path, size_t{1} << 30)); }

void expect_cases(const Json& cases) {
  for (const Tokenizer* tokenizer : {&from_json(), &from_ranks()}) {
    for (const Json& one : cases) {
      const auto text = one["text"].get<std::string>();
      ASSERT_EQ(tokenizer->encode(text), one["ids"].get<std::vector<int32_t>>()) << text;
      ASSERT_EQ(tokenizer->decode(one["ids"].get<std::vector<int32_t>>()), text);
      if (!one.contains("plain")) continue;
      ASSERT_EQ(tokenizer->encode(text, {.parse_special = false}), one["plain"].get<std::vector<int32_t>>())
          << text;
    }
  }
}

std::string random_text(std::mt19937& random) {
  std::string text;
  const size_t length = random() % 60;
  for (size_t i = 0; i < length; ++i) {
    const char32_t limits[] = {0x80, 0x800, 0x3000, 0x10000, kEndOfUnicode};
    const char32_t c = random() % limits[random() % 5];
    if (c < 0xD800 || c > 0xDFFF) append_utf8(text, c);
  }
  return text;
}

TEST(Tokenizer, gives_the_reference_ids_from_both_files) {
  const Json cases = read_cases(kSource / "tests/data/reference/goldens/tokenizer_cases.json");
  ASSERT_EQ(cases.size(), 225u);
  expect_cases(cases);
}

TEST(Tokenizer, gives_the_reference_ids_of_hard_cases) {
  const Json cases = read_cases(kSource / "tests/data/tokenizer/hard_cases.json");
  ASSERT_EQ(cases.size(), 300u);
  expect_cases(cases);
}

// See make_tokenizer_cases.py.
TEST(Tokenizer, gives_the_reference_ids_of_a_cases_file) {
  const char* path = std::getenv("KILIN_TOKENIZER_CASES");
  if (path == nullptr) GTEST_SKIP() << "KILIN_TOKENIZER_CASES names no file";
  expect_cases(read_cases(path));
}

TEST(Tokenizer, decoding_gives_back_every_byte) {
  std::mt19937 random(1);
  for (int i = 0; i < 2000; ++i) {
    const std::string text = random_text(random);
    const std::vector<int32_t> ids = from_json().encode(text);
    ASSERT_EQ(from_json().decode(ids), text);
    ASSERT_EQ(from_ranks().encode(text), ids);
  }
}

TEST(Tokenizer, streamed_text_is_the_text_decoded_at_once) {
  std::mt19937 random(2);
  for (int i = 0; i < 2000; ++i) {
    const bool skip = random() % 2 == 0;
    StreamDecoder stream(from_json(), skip);
    std::vector<int32_t> ids;
    std::string text;
    for (size_t k = 0, count = random() % 30; k < count; ++k) {
      // Single bytes above 0x7F are among the first 256 ids: half of all draws, to break characters often.
      const uint32_t limit = random() % 2 == 0 ? 256u : static_cast<uint32_t>(from_json().vocab_size());
      ids.push_back(static_cast<int32_t>(random() % limit));
      const std::string part = stream.push(ids.back());
      ASSERT_EQ(find_invalid_utf8(part), std::string_view::npos);
      text += part;
    }
    text += stream.flush();
    ASSERT_EQ(text, lossy_utf8(from_json().decode(ids, skip)));
  }
}

TEST(Tokenizer, a_character_is_streamed_with_its_last_byte) {
  StreamDecoder stream(from_json(), true);
  const std::string smile = "🙂";
  for (size_t i = 0; i < smile.size(); ++i) {
    EXPECT_EQ(stream.push(from_json().token_to_id(smile.substr(i, 1)).value()),
              i + 1 == smile.size() ? smile : "");
  }
  EXPECT_EQ(stream.push(from_json().token_to_id("\xF0").value()), "");
  EXPECT_EQ(stream.flush(), kReplacementCharacter);
  EXPECT_EQ(stream.flush(), "");
}

TEST(Tokenizer, knows_the_special_tokens_of_the_config) {
  for (const Tokenizer* tokenizer : {&from_json(), &from_ranks()}) {
    EXPECT_EQ(tokenizer->vocab_size(), 8192);
    EXPECT_EQ(tokenizer->bos_id(), 7936);
    EXPECT_EQ(tokenizer->eos_id(), 7937);
    EXPECT_EQ(tokenizer->unk_id(), 8190);
    EXPECT_EQ(tokenizer->pad_id(), 8191);
    EXPECT_EQ(tokenizer->token_to_id("<|im_end|>"), 7938);
    EXPECT_EQ(tokenizer->token_to_id("no such token"), std::nullopt);
    EXPECT_TRUE(tokenizer->is_special(7938));
    EXPECT_FALSE(tokenizer->is_special(100));
    EXPECT_EQ(tokenizer->token_bytes(7941), "<|reserved_token_7941|>");
    const std::vector<int32_t> ids = tokenizer->encode("[BOS]hi<|im_end|>");
    EXPECT_EQ(tokenizer->decode(ids, true), "hi");
    EXPECT_EQ(tokenizer->decode(ids), "[BOS]hi<|im_end|>");
  }
}

TEST(Tokenizer, an_id_outside_the_vocabulary_is_an_error_that_names_it) {
  for (const int32_t id : {-1, 8192, INT32_MAX, INT32_MIN}) {
    try {
      static_cast<void>(from_json().decode({&id, 1}));
      ADD_FAILURE() << id;
    } catch (const Error& error) {
      EXPECT_EQ(error.what(), fmt::format("token id {} is outside the vocabulary of 8192", id));
    }
    EXPECT_THROW(static_cast<void>(from_json().is_special(id)), Error);
  }
}

TEST(Tokenizer, invalid_utf8_is_an_error_that_names_the_byte) {
  try {
    static_cast<void>(from_json().encode("ab\xED\xA0\x80"));
    FAIL();
  } catch (const Error& error) {
    EXPECT_STREQ(error.what(), "text: invalid UTF-8 at byte 2 of 5 (byte 0xED)");
  }
}

TEST(Tokenizer, a_megabyte_without_a_boundary_takes_linear_time) {
  for (const char* unit : {"a", " ", "中", "ab", "e\u0301", "="}) {
    std::string text;
    while (text.size() < 1'000'000) text += unit;
    const auto start = std::chrono::steady_clock::now();
    const std::vector<int32_t> ids = from_json().encode(text);
    EXPECT_LT(std::chrono::steady_clock::now() - start, std::chrono::seconds(10)) << unit;
    EXPECT_EQ(from_json().decode(ids), text);
  }
}

}  // namespace
}  // namespace kilin::text
