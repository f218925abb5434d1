// SPDX-License-Identifier: Apache-2.0
#include "text/gguf_tokenizer.h"

#include <gtest/gtest.h>

#include <functional>
#include <map>
#include <random>

#include "io/test_support.h"
#include "text/file.h"
#include "text/json_fields.h"
#include "text/utf8.h"

namespace kilin::text {
namespace {

using io::error_of;

const std::filesystem::path kSource = KILIN_SOURCE_DIR;
const std::filesystem::path kModel = kSource / "models/kilin-docs-10m";
constexpr int32_t kVocabSize = 8192;

TokenizerParts parts_of_ranks() {
  io::TemporaryDirectory directory;
  for (const char* name : {"tiktoken.model", "tokenizer_config.json"})
    std::filesystem::copy_file(kModel / name, std::filesystem::path(directory.path()) / name);
  return Tokenizer::load_parts(directory.path());
}

io::GgufFile written(const TokenizerParts& parts, const std::string& path, int32_t vocab_size = kVocabSize) {
  io::GgufWriter writer(path);
  write_gguf_tokenizer(parts, vocab_size, writer);
  writer.commit();
  return io::GgufFile::open(path);
}

void expect_same_ids(const Tokenizer& tokenizer, const std::filesystem::path& path) {
  const Json cases = parse_json(read_file(path, size_t{1} << 30));
  ASSERT_GT(cases.size(), 200u);
  for (const Json& one : cases) {
    const auto text = one["text"].get<std::string>();
    ASSERT_EQ(tokenizer.encode(text), one["ids"].get<std::vector<int32_t>>()) << text;
    ASSERT_EQ(tokenizer.decode(one["ids"].get<std::vector<int32_t>>()), text);
    if (!one.contains("plain")) continue;
    ASSERT_EQ(tokenizer.encode(text, {.parse_special = false}), one["plain"].get<std::vector<int32_t>>());
  }
}

void expect_reference_ids(const Tokenizer& tokenizer) {
  expect_same_ids(tokenizer, kSource / "tests/data/reference/goldens/tokenizer_cases.json");
  expect_same_ids(tokenizer, kSource / "tests/data/tokenizer/hard_cases.json");
}

void expect_same_tokens(const Tokenizer& a, const Tokenizer& b) {
  ASSERT_EQ(a.vocab_size(), b.vocab_size());
  for (int32_t id = 0; id < a.vocab_size(); ++id) {
    ASSERT_EQ(a.token_bytes(id), b.token_bytes(id)) << id;
    ASSERT_EQ(a.is_special(id), b.is_special(id)) << id;
  }
  EXPECT_EQ(a.bos_id(), b.bos_id());
  EXPECT_EQ(a.eos_id(), b.eos_id());
  EXPECT_EQ(a.pad_id(), b.pad_id());
  EXPECT_EQ(a.unk_id(), b.unk_id());
}

TEST(GgufTokenizer, gives_the_reference_ids_when_written_and_read_back) {
  io::TemporaryDirectory directory;
  const Tokenizer original = Tokenizer::load(kModel);
  ASSERT_TRUE(original.bos_id() && original.eos_id() && original.pad_id() && original.unk_id());
  for (const TokenizerParts& parts : {Tokenizer::load_parts(kModel), parts_of_ranks()}) {
    const Tokenizer tokenizer = Tokenizer::from_gguf(written(parts, directory.file("vocabulary.gguf")));
    expect_same_tokens(tokenizer, original);
    expect_reference_ids(tokenizer);
  }
}

TEST(GgufTokenizer, gives_the_reference_ids_when_it_becomes_a_tokenizer_json) {
  io::TemporaryDirectory directory;
  const io::GgufFile file = written(parts_of_ranks(), directory.file("vocabulary.gguf"));
  const HuggingFaceTokenizer texts = hugging_face_tokenizer(parse_gguf_tokenizer(file), std::nullopt);
  directory.write("tokenizer.json", texts.tokenizer_json);
  directory.write("tokenizer_config.json", texts.tokenizer_config_json);
  const Tokenizer tokenizer = Tokenizer::load(directory.path());
  expect_same_tokens(tokenizer, Tokenizer::load(kModel));
  expect_reference_ids(tokenizer);
}

TEST(GgufTokenizer, a_tokenizer_json_that_went_through_gguf_says_the_same) {
  io::TemporaryDirectory directory;
  const io::GgufFile file = written(Tokenizer::load_parts(kModel), directory.file("vocabulary.gguf"));
  const Json ours = parse_json(hugging_face_tokenizer(parse_gguf_tokenizer(file), {}).tokenizer_json);
  const Json theirs = parse_json(read_file(kModel / "tokenizer.json", size_t{1} << 30));
  EXPECT_EQ(ours, theirs);
}

TEST(GgufTokenizer, gives_the_ids_of_the_original_on_any_text) {
  io::TemporaryDirectory directory;
  const Tokenizer original = Tokenizer::load_tiktoken(kModel / "tiktoken.model", "");
  TokenizerParts parts = parts_of_ranks();
  const Tokenizer tokenizer = Tokenizer::from_gguf(written(parts, directory.file("vocabulary.gguf")));
  std::mt19937 random(3);
  for (int i = 0; i < 3000; ++i) {
    std::vector<int32_t> ids;
    for (size_t k = 0, count = random() % 20; k < count; ++k)
      ids.push_back(static_cast<int32_t>(random() % 7936));
    const std::string text = lossy_utf8(original.decode(ids));
    ASSERT_EQ(tokenizer.encode(text, {.parse_special = false}),
              original.encode(text, {.parse_special = false}))
        << text;
  }
}

TEST(GgufTokenizer, is_written_as_the_converter_of_llama_cpp_writes_it) {
  io::TemporaryDirectory directory;
  const io::GgufFile file = written(parts_of_ranks(), directory.file("vocabulary.gguf"), 8200);
  EXPECT_EQ(file.get_string("tokenizer.ggml.model"), "gpt2");
  EXPECT_EQ(file.get_string("tokenizer.ggml.pre"), "kimi-k2");
  const auto& tokens = file.get_strings("tokenizer.ggml.tokens");
  const auto& types = file.get_ints("tokenizer.ggml.token_type");
  const auto& merges = file.get_strings("tokenizer.ggml.merges");
  ASSERT_EQ(tokens.size(), 8200u);
  ASSERT_EQ(types.size(), 8200u);
  EXPECT_EQ(tokens[0], "!");
  EXPECT_EQ(tokens[256], "ĠĠ");
  EXPECT_EQ(types[256], 1);
  EXPECT_EQ(tokens[7936], "[BOS]");
  EXPECT_EQ(types[7936], 3);
  EXPECT_EQ(tokens[8195], "[PAD8195]");
  EXPECT_EQ(types[8195], 5);
  // One merge for each token of several bytes, that of tokens 256 and 257 first.
  EXPECT_EQ(merges.size(), 7936u - 256);
  EXPECT_EQ(merges[0], "Ġ Ġ");
  EXPECT_EQ(merges[1], "Ġ t");
  EXPECT_EQ(file.get_int("tokenizer.ggml.bos_token_id"), 7936);
  EXPECT_EQ(file.get_int("tokenizer.ggml.eos_token_id"), 7937);
  EXPECT_EQ(file.get_int("tokenizer.ggml.unknown_token_id"), 8190);
  EXPECT_EQ(file.get_int("tokenizer.ggml.padding_token_id"), 8191);
  const Tokenizer tokenizer = Tokenizer::from_gguf(file);
  EXPECT_EQ(tokenizer.token_bytes(8191), "[PAD]");
  EXPECT_EQ(tokenizer.vocab_size(), 8200);
  EXPECT_EQ(tokenizer.token_bytes(8195), "");
  EXPECT_EQ(tokenizer.token_to_id("[PAD8195]"), std::nullopt);
}

// The 256 bytes, some words, and four tokens of other types; entries are changed by the tests.
struct SmallFile {
  std::map<std::string, std::string> strings = {{"tokenizer.ggml.model", "gpt2"},
                                                {"tokenizer.ggml.pre", "kimi-k2"}};
  std::vector<std::string> tokens, merges = {"a b", "ab c", "Ġ ab"};
  std::vector<int32_t> types;
  std::map<std::string, uint32_t> ids;
  bool with_merges = true, with_types = true;
  io::TemporaryDirectory directory;

  SmallFile() {
    static const auto kBytes = parse_gguf_bytes();
    tokens = kBytes;
    for (const char* token : {"ab", "abc", "Ġab", "<|end|>", "<think>", "[PAD261]", "<unk>"})
      tokens.emplace_back(token);
    types.assign(tokens.size(), 1);
    types[259] = 3, types[260] = 4, types[261] = 5, types[262] = 2;
  }
  static std::vector<std::string> parse_gguf_bytes() {
    io::TemporaryDirectory directory;
    const auto file = written(Tokenizer::load_parts(kModel), directory.file("bytes.gguf"));
    const auto& all = file.get_strings("tokenizer.ggml.tokens");
    return {all.begin(), all.begin() + 256};
  }

  io::GgufFile open() const {
    const std::string path = directory.file("small.gguf");
    io::GgufWriter writer(path);
    for (const auto& [key, value] : strings) writer.add_string(key, value);
    for (const auto& [key, value] : ids) writer.add_uint32(key, value);
    writer.add_strings("tokenizer.ggml.tokens", tokens);
    if (with_types) writer.add_int32s("tokenizer.ggml.token_type", types);
    if (with_merges) writer.add_strings("tokenizer.ggml.merges", merges);
    writer.commit();
    return io::GgufFile::open(path);
  }
  // Behind the path and ": ".
  std::string error() const {
    const std::string text = error_of([&] { Tokenizer::from_gguf(open()); });
    const std::string start = directory.file("small.gguf") + ": ";
    return text.starts_with(start) ? text.substr(start.size()) : text;
  }
};

using Ids = std::vector<int32_t>;

TEST(GgufTokenizer, types_of_tokens_decide_what_they_are) {
  SmallFile small;
  small.ids = {{"tokenizer.ggml.eos_token_id", 259}, {"tokenizer.ggml.padding_token_id", 256}};
  const Tokenizer tokenizer = Tokenizer::from_gguf(small.open());
  EXPECT_EQ(tokenizer.encode("abc ab<|end|><think><unk>"), (Ids{257, 258, 259, 260, 262}));
  EXPECT_TRUE(tokenizer.is_special(259));
  EXPECT_FALSE(tokenizer.is_special(260));
  EXPECT_TRUE(tokenizer.is_special(262));
  EXPECT_EQ(tokenizer.token_bytes(261), "");
  EXPECT_GT(tokenizer.encode("[PAD261]").size(), 2u);
  EXPECT_GT(tokenizer.encode("<|end|>", {.parse_special = false}).size(), 1u);
  EXPECT_EQ(tokenizer.encode("<think>", {.parse_special = false}), Ids{260});
  EXPECT_EQ(tokenizer.eos_id(), 259);
  EXPECT_EQ(tokenizer.pad_id(), 256);
  EXPECT_EQ(tokenizer.bos_id(), std::nullopt);
}

TEST(GgufTokenizer, byte_tokens_are_single_bytes) {
  SmallFile small;
  small.tokens[0] = "<0x21>";  // was "!"
  small.types[0] = 6;
  const Tokenizer tokenizer = Tokenizer::from_gguf(small.open());
  EXPECT_EQ(tokenizer.encode("!"), Ids{0});
  EXPECT_EQ(tokenizer.token_bytes(0), "!");
}

TEST(GgufTokenizer, without_merges_kimis_are_those_of_the_ranks_and_others_are_refused) {
  SmallFile small;
  small.with_merges = false;
  EXPECT_EQ(Tokenizer::from_gguf(small.open()).encode("xabcab"),
            (Ids{static_cast<int32_t>('x' - '!'), 257, 256}));
  small.strings["tokenizer.ggml.pre"] = "gpt-2";
  EXPECT_EQ(small.error(), "key 'tokenizer.ggml.merges': missing, expected an array of strings");
}

TEST(GgufTokenizer, the_pattern_is_the_one_that_the_file_names) {
  SmallFile small;
  small.tokens[258] = "12", small.merges = {"a b", "ab c", "1 2"};
  EXPECT_EQ(Tokenizer::from_gguf(small.open()).encode("0012").size(), 4u);  // 001 2
  small.strings["tokenizer.ggml.pre"] = "gpt-2";
  EXPECT_EQ(Tokenizer::from_gguf(small.open()).encode("0012").size(), 3u);  // 0012
}

TEST(GgufTokenizer, whole_pieces_are_taken_by_kimis_rule_alone) {
  SmallFile small;
  small.merges = {"a b", "Ġ ab"};  // none leads to abc
  EXPECT_EQ(Tokenizer::from_gguf(small.open()).encode("abc"), Ids{257});
  small.strings["tokenizer.ggml.pre"] = "gpt-2";
  EXPECT_EQ(Tokenizer::from_gguf(small.open()).encode("abc").size(), 2u);
}

TEST(GgufTokenizer, long_text_is_cut_when_the_file_does_not_say_otherwise) {
  SmallFile small;
  EXPECT_TRUE(parse_gguf_tokenizer(small.open()).cut_long_text);
  small.strings["kilin.tokenizer_class"] = "PreTrainedTokenizerFast";
  EXPECT_FALSE(parse_gguf_tokenizer(small.open()).cut_long_text);
  small.strings["kilin.tokenizer_class"] = "TikTokenTokenizer";
  EXPECT_TRUE(parse_gguf_tokenizer(small.open()).cut_long_text);
  small.strings["kilin.tokenizer_class"] = "Other";
  EXPECT_EQ(small.error(),
            "key 'kilin.tokenizer_class': found 'Other', expected 'TikTokenTokenizer' or "
            "'PreTrainedTokenizerFast'");
  small.strings.erase("kilin.tokenizer_class");
  small.strings["tokenizer.ggml.pre"] = "gpt-2";
  EXPECT_FALSE(parse_gguf_tokenizer(small.open()).cut_long_text);
}

// Written by ggml's own package, with the bytes in their own order (tests/data/gguf/make.py).
TEST(GgufTokenizer, reads_a_file_of_ggml) {
  const auto file = io::GgufFile::open(KILIN_SOURCE_DIR "/tests/data/gguf/tokenizer.gguf");
  const Tokenizer tokenizer = Tokenizer::from_gguf(file);
  EXPECT_EQ(tokenizer.encode("ab ab\n<|end|>"), (Ids{256, 257, 10, 258}));
  EXPECT_EQ(tokenizer.encode("\u4e2d"), (Ids{0xe4, 0xb8, 0xad}));
  for (int32_t byte = 0; byte < 256; ++byte)
    EXPECT_EQ(tokenizer.token_bytes(byte), std::string(1, static_cast<char>(byte)));
  EXPECT_EQ(tokenizer.token_bytes(259), "");
  EXPECT_EQ(tokenizer.eos_id(), 258);
  const auto chat = ChatTemplate::from_gguf(file, tokenizer);
  ASSERT_TRUE(chat.has_value());
  const ChatMessage message{"user", "hi"};
  EXPECT_EQ(chat->render({&message, 1}, true), "hi<|end|>");
}

struct Bad {
  const char* name;
  std::function<void(SmallFile&)> spoil;
  const char* message;
};
void PrintTo(const Bad& bad, std::ostream* out) { *out << bad.name; }

class BadGgufTokenizer : public testing::TestWithParam<Bad> {};

TEST_P(BadGgufTokenizer, is_refused_by_key) {
  SmallFile small;
  ASSERT_EQ(small.error(), "");
  GetParam().spoil(small);
  EXPECT_EQ(small.error(), GetParam().message);
}

const Bad kBad[] = {
    {"no_model", [](SmallFile& f) { f.strings.erase("tokenizer.ggml.model"); },
     "key 'tokenizer.ggml.model': missing, expected a string"},
    {"model", [](SmallFile& f) { f.strings["tokenizer.ggml.model"] = "llama"; },
     "key 'tokenizer.ggml.model': found 'llama', expected 'gpt2'"},
    {"no_pre", [](SmallFile& f) { f.strings.erase("tokenizer.ggml.pre"); },
     "key 'tokenizer.ggml.pre': missing, expected a string"},
    {"pre", [](SmallFile& f) { f.strings["tokenizer.ggml.pre"] = "qwen2\n"; },
     "key 'tokenizer.ggml.pre': found 'qwen2\\x0a', expected 'kimi-k2' or 'gpt-2', the splitters of text "
     "that "
     "Kilin has"},
    {"too_few_types", [](SmallFile& f) { f.types.pop_back(); },
     "key 'tokenizer.ggml.token_type': found 262 types, expected 263, one of each token"},
    {"type", [](SmallFile& f) { f.types[3] = 7; },
     "key 'tokenizer.ggml.token_type': token 3: found type 7, expected 1 to 6"},
    {"not_utf8", [](SmallFile& f) { f.tokens[260] = "<\xff>"; },
     "key 'tokenizer.ggml.tokens': token 260: found '<\\xff>', expected UTF-8"},
    {"not_byte_level", [](SmallFile& f) { f.tokens[257] = "a c"; },
     "key 'tokenizer.ggml.tokens': token 257: found 'a c', expected characters of the byte-level alphabet"},
    {"no_types", [](SmallFile& f) { f.with_types = false; }, ""},
    {"empty_token", [](SmallFile& f) { f.tokens[257] = ""; },
     "key 'tokenizer.ggml.tokens': token 257: found '', expected characters of the byte-level alphabet"},
    {"empty_added_token", [](SmallFile& f) { f.tokens[259] = ""; },
     "key 'tokenizer.ggml.tokens': token 259: found an added token without text, expected some"},
    {"byte_token", [](SmallFile& f) { f.types[257] = 6; },
     "key 'tokenizer.ggml.tokens': token 257: found the byte token 'abc', expected a form like '<0x0A>'"},
    {"byte_token_digits", [](SmallFile& f) { f.types[257] = 6, f.tokens[257] = "<0xG1>"; },
     "key 'tokenizer.ggml.tokens': token 257: found the byte token '<0xG1>', expected a form like '<0x0A>'"},
    {"token_twice", [](SmallFile& f) { f.tokens[257] = "Ġab", f.merges.clear(); },
     "tokenizer: tokens 257 and 258 have the same bytes"},
    {"added_token_twice", [](SmallFile& f) { f.tokens[260] = "<|end|>"; },
     "tokenizer: added tokens 259 and 260 have the same text '<|end|>'"},
    {"byte_missing", [](SmallFile& f) { f.types[0] = 5; },
     "tokenizer: vocabulary: no token for byte 0x21, expected one for each of the 256 bytes"},
    {"merge_without_space", [](SmallFile& f) { f.merges[1] = "abc"; },
     "key 'tokenizer.ggml.merges': merge 1: found 'abc', expected two tokens with a space between"},
    {"merge_of_three", [](SmallFile& f) { f.merges[1] = "a b c"; },
     "key 'tokenizer.ggml.merges': merge 1: found 'a b c', expected two tokens with a space between"},
    {"merge_of_unknown_token", [](SmallFile& f) { f.merges[1] = "abx c"; },
     "key 'tokenizer.ggml.merges': merge 1: found 'abx', which is none of the tokens"},
    {"merge_to_unknown_token", [](SmallFile& f) { f.merges[1] = "ab x"; },
     "key 'tokenizer.ggml.merges': merge 1: found 'abx', which is none of the tokens"},
    {"merge_of_hole", [](SmallFile& f) { f.merges[1] = "[PAD26 1]"; },
     "key 'tokenizer.ggml.merges': merge 1: found '[PAD26', which is none of the tokens"},
    {"id_outside", [](SmallFile& f) { f.ids["tokenizer.ggml.eos_token_id"] = 263; },
     "key 'tokenizer.ggml.eos_token_id': found 263, expected an id from 0 to 262"},
    {"id_of_hole", [](SmallFile& f) { f.ids["tokenizer.ggml.bos_token_id"] = 261; },
     "key 'tokenizer.ggml.bos_token_id': found 261, an unused id, expected that of a token"},
};

INSTANTIATE_TEST_SUITE_P(GgufTokenizer, BadGgufTokenizer, testing::ValuesIn(kBad),
                         [](const auto& test) { return std::string(test.param.name); });

std::string write_error(const TokenizerParts& parts, int32_t vocab_size) {
  io::TemporaryDirectory directory;
  return error_of([&] { written(parts, directory.file("x.gguf"), vocab_size); });
}

TEST(GgufTokenizer, what_gguf_cannot_say_is_not_written) {
  const SmallFile small;
  const TokenizerParts good = parse_gguf_tokenizer(small.open());
  EXPECT_EQ(write_error(good, 263), "");
  EXPECT_EQ(write_error(good, 262), "tokenizer: found 263 tokens, expected at most the model's 262");
  TokenizerParts parts = good;
  parts.split_patterns = {"\\w+"};
  EXPECT_EQ(
      write_error(parts, 300),
      "tokenizer: found the split pattern '\\w+', expected Kimi's split pattern or GPT-2's, the only ones "
      "Kilin can name in GGUF");
  parts.split_patterns = {std::string(kKimiPattern), "\\w+"};
  EXPECT_TRUE(write_error(parts, 300).starts_with("tokenizer: found 2 split patterns, expected Kimi's"));
  parts = good;
  parts.added[0].lstrip = true;
  EXPECT_EQ(
      write_error(parts, 300),
      "tokenizer: added token '<|end|>': takes white space along (lstrip, rstrip), which GGUF cannot say");
  parts = good;
  parts.added[0].id = 300;
  EXPECT_EQ(write_error(parts, 300),
            "tokenizer: added token '<|end|>': found id 300, expected one below the model's 300");
  parts = good;
  parts.whole_first = false;  // no difference: merges lead to every token
  EXPECT_EQ(write_error(parts, 300), "");
  parts.merges.resize(1);
  EXPECT_EQ(
      write_error(parts, 300),
      "tokenizer: token 257 ('abc'): no merges lead to it, so that ids would depend on whether a piece of "
      "text that is a token is taken whole; it is not taken so here, and is with GGUF's 'kimi-k2'");
}

TEST(GgufTokenizer, holes_below_the_last_token_are_filled_in_tokenizer_json) {
  const SmallFile small;
  const HuggingFaceTokenizer texts = hugging_face_tokenizer(parse_gguf_tokenizer(small.open()), std::nullopt);
  const Json model = parse_json(texts.tokenizer_json)["model"];
  EXPECT_EQ(model["vocab"]["[PAD261]"], 261);
  EXPECT_EQ(model["vocab"].size(), 260u);
  EXPECT_EQ(model["merges"], Json::parse(R"([["a","b"],["ab","c"],["Ġ","ab"]])"));
}

TEST(GgufTokenizer, the_chat_template_comes_along) {
  io::TemporaryDirectory directory;
  const std::string path = directory.file("chat.gguf");
  const auto text = ChatTemplate::load_text(kModel);
  ASSERT_TRUE(text.has_value());
  {
    io::GgufWriter writer(path);
    write_gguf_tokenizer(Tokenizer::load_parts(kModel), kVocabSize, writer);
    write_gguf_chat_template(*text, writer);
    writer.commit();
  }
  const io::GgufFile file = io::GgufFile::open(path);
  const auto chat = ChatTemplate::from_gguf(file, Tokenizer::from_gguf(file));
  ASSERT_TRUE(chat.has_value());
  const std::vector<ChatMessage> messages = {{"system", "Be brief."}, {"user", "Grüße\n"}};
  EXPECT_EQ(chat->render(messages, true), ChatTemplate::load(kModel)->render(messages, true));
  const auto texts = hugging_face_tokenizer(parse_gguf_tokenizer(file), gguf_chat_template(file));
  EXPECT_EQ(parse_json(texts.tokenizer_config_json)["chat_template"], text->text);
}

TEST(GgufTokenizer, a_chat_template_for_tools_and_the_named_tokens_come_along) {
  const SmallFile small;
  const std::string path = small.directory.file("chat.gguf");
  TokenizerParts parts = parse_gguf_tokenizer(small.open());
  parts.named.bos = "<|end|>";
  {
    io::GgufWriter writer(path);
    write_gguf_tokenizer(parts, 263, writer);
    write_gguf_chat_template({"{{ bos_token }} plain", "{{ bos_token }} tools {{ tools }}"}, writer);
    writer.commit();
  }
  const io::GgufFile file = io::GgufFile::open(path);
  EXPECT_EQ(file.get_strings("tokenizer.chat_templates"), std::vector<std::string>{"tool_use"});
  const auto chat = ChatTemplate::from_gguf(file, Tokenizer::from_gguf(file));
  const OrderedJson none = OrderedJson::array();
  EXPECT_EQ(chat->render_json(none, nullptr, false), "<|end|> plain");
  EXPECT_EQ(chat->render_json(none, none, false), "<|end|> tools []");
  small.directory.write("tokenizer_config.json",
                        hugging_face_tokenizer(parts, gguf_chat_template(file)).tokenizer_config_json);
  EXPECT_EQ(ChatTemplate::load(small.directory.path())->render_json(none, none, false), "<|end|> tools []");
  EXPECT_FALSE(gguf_chat_template(small.open()).has_value());
}

}  // namespace
}  // namespace kilin::text
