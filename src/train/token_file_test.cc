// SPDX-License-Identifier: Apache-2.0
#include "train/token_file.h"

#include <gtest/gtest.h>

#include <fstream>

#include "io/test_support.h"

namespace kilin::train {
namespace {

using io::error_of;
using io::TemporaryDirectory;

std::string write_file(const TemporaryDirectory& directory, uint64_t vocab, const std::vector<int32_t>& ids) {
  std::string path = directory.file("t.kbin");
  TokenFileWriter writer(path, {vocab, 77, 0, 0, 1, -1});
  writer.add_document(std::span(ids).first(ids.size() / 2));
  writer.add_document(std::span(ids).subspan(ids.size() / 2));
  writer.commit();
  return path;
}

TEST(TokenFile, ReadsWhatWasWritten) {
  for (const uint64_t vocab : {uint64_t{65536}, uint64_t{65537}, uint64_t{163840}}) {
    const TemporaryDirectory directory;
    const std::vector<int32_t> ids{1, 0, static_cast<int32_t>(vocab) - 1, 7, 300};
    const TokenFile file = TokenFile::open(write_file(directory, vocab, ids));
    EXPECT_EQ(file.header().vocab_size, vocab);
    EXPECT_EQ(file.header().tokenizer_hash, 77u);
    EXPECT_EQ(file.header().documents, 2u);
    EXPECT_EQ(file.header().bos_id, 1);
    EXPECT_EQ(file.header().eos_id, -1);
    ASSERT_EQ(file.tokens(), ids.size());
    std::vector<int32_t> found(3);
    file.read(2, 3, found.data());
    EXPECT_EQ(found, (std::vector<int32_t>{ids[2], ids[3], ids[4]}));
    EXPECT_EQ(std::filesystem::file_size(directory.file("t.kbin")),
              64 + ids.size() * (vocab > 65536 ? 4 : 2));
  }
}

TEST(TokenFile, RefusesIdsOutsideTheVocabulary) {
  const TemporaryDirectory directory;
  TokenFileWriter writer(directory.file("t.kbin"), {10, 0, 0, 0, -1, -1});
  const std::vector<int32_t> ids{3, 10};
  EXPECT_EQ(error_of([&] { writer.add_document(ids); }),
            directory.file("t.kbin") + ": found id 10, expected one below 10");
}

TEST(TokenFile, DamageIsFound) {
  const TemporaryDirectory directory;
  const std::string path = write_file(directory, 100, {1, 2, 3, 4, 5, 6});
  std::string good;
  {
    std::ifstream in(path, std::ios::binary);
    good.assign(std::istreambuf_iterator<char>(in), {});
  }
  const auto error = [](std::string bytes) {
    return error_of([&] { TokenFile::parse(std::as_bytes(std::span(bytes)), "t.kbin"); });
  };
  EXPECT_EQ(error(good), "");
  EXPECT_EQ(error(good.substr(0, 20)), "t.kbin: found 20 bytes, expected a token file's header of 64");
  EXPECT_EQ(error(good.substr(0, 70)),
            "t.kbin: found 6 bytes of ids, expected 6 ids of 2 bytes (is the file cut off?)");
  EXPECT_EQ(error(good + "x"),
            "t.kbin: found 13 bytes of ids, expected 6 ids of 2 bytes (is the file cut off?)");
  for (size_t byte = 8; byte < 64; ++byte) {  // the check sum covers all of the header
    std::string damaged = good;
    damaged[byte] = static_cast<char>(damaged[byte] ^ 0x40);
    EXPECT_NE(error(damaged), "") << byte;
  }
  std::string other = good;
  other[0] = 'X';
  EXPECT_EQ(error(other),
            "t.kbin: is no token file (made by 'kilin tokenize'): it does not begin with KILINTOK");
  std::string high = good;
  high[64 + 5] = 1;  // the id 3 becomes 259
  const TokenFile file = TokenFile::parse(std::as_bytes(std::span(high)), "t.kbin");
  std::vector<int32_t> ids(6);
  EXPECT_EQ(error_of([&] { file.read(0, 6, ids.data()); }),
            "t.kbin: token 2: found id 259, expected one below 100");
}

TEST(TokenFile, TokenizerHashTellsTokenizersApart) {
  const std::string model = std::string(KILIN_SOURCE_DIR) + "/models/kilin-docs-10m";
  const text::Tokenizer tokenizer = text::Tokenizer::load(model);
  const text::Tokenizer again =
      text::Tokenizer::load_tiktoken(model + "/tiktoken.model", model + "/tokenizer_config.json");
  EXPECT_EQ(tokenizer_hash(tokenizer), tokenizer_hash(again));  // the same tokens, from another file
  text::TokenizerParts parts = text::Tokenizer::load_parts(model);
  std::swap(parts.tokens[300], parts.tokens[301]);
  EXPECT_NE(tokenizer_hash(tokenizer), tokenizer_hash(text::Tokenizer(parts)));
}

}  // namespace
}  // namespace kilin::train
