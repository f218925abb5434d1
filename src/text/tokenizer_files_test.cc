// SPDX-License-Identifier: Apache-2.0
// Small files made here: what they may say, and the error for each way they may be wrong.
#include <gtest/gtest.h>

#include <functional>

#include "base/error.h"
#include "text/file.h"
#include "text/json_fields.h"
#include "text/long_text.h"
#include "text/tokenizer.h"
#include "text/utf8.h"

namespace kilin::text {
namespace {

// The visible characters of the byte-level alphabet, in the order of the bytes.
std::string visible(int byte) {
  int next = 0x100;
  for (int b = 0; b <= byte; ++b) {
    const bool itself = (b >= '!' && b <= '~') || (b >= 0xA1 && b <= 0xAC) || b >= 0xAE;
    std::string text;
    append_utf8(text, static_cast<char32_t>(itself ? b : next));
    if (b == byte) return text;
    next += itself ? 0 : 1;
  }
  return "";
}

// Ids 0..255 the bytes, then "ab", "abc", " a", and the special "<s>" and plain "<n>".
Json small_json() {
  Json vocab;
  for (int byte = 0; byte < 256; ++byte) vocab[visible(byte)] = byte;
  vocab["ab"] = 256;
  vocab["abc"] = 257;
  vocab["Ġa"] = 258;
  const auto added = [](int id, const char* content, bool special) {
    return Json{{"id", id},        {"content", content},  {"single_word", false}, {"lstrip", false},
                {"rstrip", false}, {"normalized", false}, {"special", special}};
  };
  return {{"added_tokens", {added(259, "<s>", true), added(260, "<n>", false)}},
          {"normalizer", nullptr},
          {"pre_tokenizer", {{"type", "ByteLevel"}, {"add_prefix_space", false}, {"use_regex", true}}},
          {"post_processor", nullptr},
          {"decoder", {{"type", "ByteLevel"}}},
          {"model",
           {{"type", "BPE"},
            {"ignore_merges", false},
            {"vocab", vocab},
            {"merges", {"a b", {"ab", "c"}, "Ġ a"}}}}};
}

Tokenizer small() { return Tokenizer::from_tokenizer_json(small_json().dump()); }

std::string small_ranks() {
  static constexpr char kDigits[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
  std::string text;
  for (int byte = 0; byte < 256; ++byte) {
    text += fmt::format("{}{}== {}\n", kDigits[byte >> 2], kDigits[(byte & 3) << 4], byte);
  }
  return text + "YWI= 256\nYWJj 257\nIGE= 258\n";
}

std::string error_of(const std::function<void()>& action) {
  try {
    action();
    return "no error";
  } catch (const Error& error) {
    return error.what();
  }
}

std::string json_error(const std::function<void(Json&)>& change) {
  Json json = small_json();
  change(json);
  return error_of([&] { Tokenizer::from_tokenizer_json(json.dump()); });
}

std::string ranks_error(std::string_view ranks, std::string_view config = {}) {
  return error_of([&] { Tokenizer::from_tiktoken(ranks, config); });
}

#define EXPECT_HAS(text, part) EXPECT_NE((text).find(part), std::string::npos) << (text)

using Ids = std::vector<int32_t>;

TEST(TokenizerJson, merges_are_strings_or_pairs) {
  EXPECT_EQ(small().encode("abc ab a"), (Ids{257, ' ', 256, 258}));
}

TEST(TokenizerJson, ignore_merges_takes_a_whole_piece_that_is_a_token) {
  Json json = small_json();
  json["model"]["merges"] = Json::array();
  EXPECT_EQ(Tokenizer::from_tokenizer_json(json.dump()).encode("abc"), (Ids{'a', 'b', 'c'}));
  json["model"]["ignore_merges"] = true;
  EXPECT_EQ(Tokenizer::from_tokenizer_json(json.dump()).encode("abc"), (Ids{257}));
}

TEST(TokenizerJson, added_tokens_are_found_before_the_text_is_split) {
  EXPECT_EQ(small().encode("<s>a<n>"), (Ids{259, 'a', 260}));
  EXPECT_EQ(small().encode("<s>a<n>", {.parse_special = false}), (Ids{'<', 's', '>', 'a', 260}));
  EXPECT_EQ(small().decode(Ids{259, 'a', 260}, true), "a<n>");
}

TEST(TokenizerJson, the_longest_added_token_wins_and_may_take_spaces_along) {
  Json json = small_json();
  json["added_tokens"][1]["content"] = "<s>>";
  json["added_tokens"][1]["lstrip"] = true;
  json["added_tokens"][0]["rstrip"] = true;
  const Tokenizer tokenizer = Tokenizer::from_tokenizer_json(json.dump());
  EXPECT_EQ(tokenizer.encode("a \n<s>><s>\u3000b"), (Ids{'a', 260, 259, 'b'}));
}

TEST(TokenizerJson, what_would_change_ids_and_is_not_implemented_is_an_error_that_names_the_key) {
  const auto at = [](const char* pointer, const Json& value) {
    return json_error([&](Json& json) { json[Json::json_pointer(pointer)] = value; });
  };
  EXPECT_HAS(at("/normalizer", {{"type", "NFC"}}), "root.normalizer");
  EXPECT_HAS(at("/truncation", {{"max_length", 5}}), "root.truncation");
  EXPECT_HAS(at("/model/dropout", 0.1), "model.dropout is 0.1");
  EXPECT_HAS(at("/model/byte_fallback", true), "model.byte_fallback");
  EXPECT_HAS(at("/model/end_of_word_suffix", "</w>"), "model.end_of_word_suffix");
  EXPECT_HAS(at("/model/type", "Unigram"), "model.type is 'Unigram'");
  EXPECT_HAS(at("/pre_tokenizer/type", "Metaspace"), "pre_tokenizer.type is 'Metaspace'");
  EXPECT_HAS(at("/pre_tokenizer/add_prefix_space", true), "add_prefix_space is true");
  EXPECT_HAS(at("/decoder/type", "WordPiece"), "decoder.type is 'WordPiece'");
  EXPECT_HAS(at("/added_tokens/0/single_word", true), "added_tokens[0].single_word");
  EXPECT_HAS(at("/post_processor", {{"type", "BertProcessing"}}), "post_processor.type is 'BertProcessing'");
  const Json bos = {{"type", "TemplateProcessing"}, {"single", {{{"SpecialToken", {{"id", "<s>"}}}}}}};
  EXPECT_HAS(at("/post_processor", bos), "post_processor.single adds a special token");
}

TEST(TokenizerJson, broken_files_are_errors) {
  const auto at = [](const char* pointer, const Json& value) {
    return json_error([&](Json& json) { json[Json::json_pointer(pointer)] = value; });
  };
  const std::string text = small_json().dump();
  for (const size_t length : {size_t{0}, size_t{1}, text.size() / 2, text.size() - 1}) {
    EXPECT_HAS(error_of([&] { Tokenizer::from_tokenizer_json(text.substr(0, length)); }), "not JSON");
  }
  EXPECT_HAS(error_of([] { Tokenizer::from_tokenizer_json("[]"); }),
             "root is array of 0, expected an object");
  EXPECT_HAS(at("/model/vocab/ab", -1), "is -1, expected a token id");
  EXPECT_HAS(at("/model/vocab/ab", int64_t{1} << 40), "is 1099511627776, expected a token id");
  EXPECT_HAS(at("/model/vocab/ab", "256"), "is \"256\", expected a token id");
  EXPECT_HAS(at("/model/vocab/ab", 257), "id 257 has two tokens");
  EXPECT_HAS(at("/model/vocab", Json::array()), "model.vocab is array of 0, expected an object");
  EXPECT_HAS(at("/model/vocab/中", 300), "'中' (id 300) is not in the byte-level alphabet");
  EXPECT_HAS(at("/model/merges/0", "a"), "model.merges[0] is \"a\"");
  EXPECT_HAS(at("/model/merges/0", 5), "model.merges[0] is 5");
  EXPECT_HAS(at("/model/merges/0", "x y"), "model.merges[0]: 'xy' is not in model.vocab");
  EXPECT_HAS(at("/added_tokens/0/id", 5), "added token '<s>' has the id 5 of the token");
  EXPECT_HAS(at("/added_tokens/0/id", 260), "have the same id 260");
  EXPECT_HAS(at("/added_tokens/0/content", "<n>"), "have the same text '<n>'");
  EXPECT_HAS(at("/added_tokens/0/content", ""), "is empty");
  EXPECT_HAS(at("/added_tokens/0/content", "ab"), "'ab' has id 259, but model.vocab has it as 256");
  EXPECT_HAS(at("/added_tokens/0/special", 1), "added_tokens[0].special is 1");
  EXPECT_HAS(at("/pre_tokenizer", nullptr), "root.pre_tokenizer is missing");
  EXPECT_HAS(json_error([](Json& json) { json["model"]["vocab"].erase("b"); }), "'b' is not in model.vocab");
  EXPECT_HAS(json_error([](Json& json) { json["model"]["vocab"].erase("Ā"); }), "no token for byte 0x00");
}

TEST(Tiktoken, ranks_are_merges_and_ids) {
  const Tokenizer tokenizer = Tokenizer::from_tiktoken(small_ranks());
  EXPECT_EQ(tokenizer.encode("abc ab a"), (Ids{257, ' ', 256, 258}));
  EXPECT_EQ(tokenizer.vocab_size(), 259 + 256);
  EXPECT_EQ(tokenizer.token_bytes(300), "<|reserved_token_300|>");
  EXPECT_TRUE(tokenizer.is_special(514));
  EXPECT_EQ(tokenizer.bos_id(), std::nullopt);
}

TEST(Tiktoken, the_config_names_special_tokens) {
  const char* config = R"({"added_tokens_decoder": {"259": {"content": "[BOS]", "special": true},
                           "261": {"content": "<tool>"}}, "bos_token": {"content": "[BOS]"}})";
  const Tokenizer tokenizer = Tokenizer::from_tiktoken(small_ranks(), config);
  EXPECT_EQ(tokenizer.bos_id(), 259);
  EXPECT_EQ(tokenizer.encode("[BOS]a<tool>"), (Ids{259, 'a', 261}));
  EXPECT_EQ(tokenizer.decode(Ids{259, 'a', 261}, true), "a<tool>");
}

TEST(Tiktoken, broken_files_are_errors) {
  const std::string ranks = small_ranks();
  EXPECT_HAS(ranks_error(""), "no tokens");
  EXPECT_HAS(ranks_error(ranks + "????? 259\n"), "line 260: the token is not base64");
  EXPECT_HAS(ranks_error(ranks + "YQ=! 259\n"), "line 260: the token is not base64");
  EXPECT_HAS(ranks_error(ranks + "YWJh\n"), "line 260: no space");
  EXPECT_HAS(ranks_error(ranks + "YWJh 258\n"), "line 260: rank 258 is there twice");
  EXPECT_HAS(ranks_error(ranks + "YWJj 259\n"), "tokens 257 and 259 have the same bytes");
  EXPECT_HAS(ranks_error(ranks + "YWJh -1\n"), "line 260: the rank is not a number");
  EXPECT_HAS(ranks_error(ranks + "YWJh 99999999999999999999\n"), "line 260: the rank is not a number");
  EXPECT_HAS(ranks_error(ranks + "YWJh 2x\n"), "line 260: the rank is not a number");
  EXPECT_HAS(ranks_error(ranks + "YWJh 300\n"), "expected ranks without gaps");
  EXPECT_HAS(ranks_error("YQ== 0\n"), "no token for byte 0x00");
  EXPECT_HAS(ranks_error(ranks, "{"), "tokenizer_config.json: not JSON");
  EXPECT_HAS(ranks_error(ranks, R"({"added_tokens_decoder": {"x": {}}})"), "'x' is not a token id");
  EXPECT_HAS(ranks_error(ranks, R"({"added_tokens_decoder": {"5": {"content": "a"}}})"), "below 259");
  EXPECT_HAS(ranks_error(ranks, R"({"added_tokens_decoder": {"259": {"content": 1}}})"), "content is 1");
  EXPECT_HAS(ranks_error(ranks, R"({"bos_token": "<x>"})"), "names the token '<x>'");
}

TEST(Tiktoken, long_text_is_cut_only_for_kimis_own_class) {
  const char* config = R"({"tokenizer_class": "TikTokenTokenizer"})";
  const std::string text = std::string(24'999, 'x') + "abc";
  const Ids whole = Tokenizer::from_tiktoken(small_ranks()).encode(text);
  const Ids cut = Tokenizer::from_tiktoken(small_ranks(), config).encode(text);
  EXPECT_EQ(whole.back(), 257);
  EXPECT_EQ((Ids{cut.end() - 3, cut.end()}), (Ids{'a', 'b', 'c'}));
}

TEST(LongText, parts_have_at_most_25000_of_a_kind_and_400000_in_all) {
  const auto sizes = [](const std::string& text) {
    std::vector<size_t> result;
    for (const std::string_view part : cut_long_text(text)) result.push_back(part.size());
    return result;
  };
  const std::string run(25'000, 'x');
  EXPECT_EQ(sizes(run), (std::vector<size_t>{25'000}));
  EXPECT_EQ(sizes(run + "x"), (std::vector<size_t>{25'000, 1}));
  EXPECT_EQ(sizes(run + "\x1C" + run), (std::vector<size_t>{50'001}));  // a space to Python
  std::string words;
  while (words.size() < 900'000) words += "word ";
  EXPECT_EQ(sizes(words), (std::vector<size_t>{400'000, 400'000, 100'000}));
}

TEST(TokenizerLoad, a_missing_file_is_an_error_that_names_it) {
  EXPECT_HAS(error_of([] { Tokenizer::load("/nonexistent"); }),
             "/nonexistent: no tokenizer.json and no tiktoken");
  EXPECT_HAS(error_of([] { Tokenizer::load_tokenizer_json("/nonexistent/t.json"); }),
             "/nonexistent/t.json: no such");
}

}  // namespace
}  // namespace kilin::text
