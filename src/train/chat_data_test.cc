// SPDX-License-Identifier: Apache-2.0
#include "train/chat_data.h"

#include <gtest/gtest.h>

#include <filesystem>

#include "base/error.h"

namespace kilin::train {
namespace {

using Ids = std::vector<int32_t>;
using text::ChatTemplate;
using text::Tokenizer;

const std::filesystem::path kModel = std::filesystem::path(KILIN_SOURCE_DIR) / "models/kilin-docs-10m";

const Tokenizer& tokenizer() {
  static const Tokenizer loaded = Tokenizer::load(kModel);
  return loaded;
}

const ChatTemplate& bundled() {
  static const ChatTemplate loaded = *ChatTemplate::load(kModel);
  return loaded;
}

ChatExample only(std::string_view record, const ChatTemplate* chat = &bundled(),
                 const ChatDataOptions& options = {}) {
  ChatData data = parse_chat_data(record, "d.jsonl", tokenizer(), chat, options);
  EXPECT_EQ(data.examples.size(), 1u);
  return data.examples.front();
}

std::string error_of(std::string_view record, const ChatTemplate* chat = &bundled(),
                     const ChatDataOptions& options = {}) {
  try {
    parse_chat_data(record, "d.jsonl", tokenizer(), chat, options);
  } catch (const Error& error) {
    return error.what();
  }
  return "no error";
}

void expect_error(const std::string& begin, std::string_view record, const ChatTemplate* chat = &bundled()) {
  EXPECT_EQ(error_of(record, chat).substr(0, begin.size()), begin);
}

// The text of the labels in a row, "|" between runs of them; each label must be the token behind it.
std::string learnt(const ChatExample& e) {
  std::string text;
  bool open = false;
  for (size_t i = 0; i < e.tokens.size(); ++i) {
    if (e.labels[i] < 0) {
      if (open) text += "|";
      open = false;
      continue;
    }
    EXPECT_EQ(e.labels[i], e.tokens.at(i + 1));
    text += tokenizer().decode(std::span(&e.labels[i], 1));
    open = true;
  }
  return text;
}

constexpr const char* kTwoTurns =
    R"({"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is a tty?"},
 {"role": "assistant", "content": "A terminal."}, {"role": "user", "content": "And sh?"},
 {"role": "assistant", "content": "A shell."}], "source": "x"})";

std::string one_line(std::string text) {
  std::replace(text.begin(), text.end(), '\n', ' ');
  return text;
}

TEST(ChatData, only_answers_count_and_their_end_marks) {
  const ChatExample e = only(one_line(kTwoTurns));
  EXPECT_EQ(tokenizer().decode(e.tokens),
            "<|im_system|>system<|im_middle|>Be brief.<|im_end|><|im_user|>user<|im_middle|>What is a "
            "tty?<|im_end|>"
            "<|im_assistant|>assistant<|im_middle|>A terminal.<|im_end|><|im_user|>user<|im_middle|>And "
            "sh?<|im_end|>"
            "<|im_assistant|>assistant<|im_middle|>A shell.<|im_end|>");
  EXPECT_EQ(e.tokens, tokenizer().encode(tokenizer().decode(e.tokens)));
  EXPECT_EQ(learnt(e), "A terminal.<|im_end|>|A shell.<|im_end|>|");
  EXPECT_EQ(e.labels.back(), -1);
}

TEST(ChatData, the_last_answer_only) {
  ChatDataOptions options;
  options.last_answer_only = true;
  EXPECT_EQ(learnt(only(one_line(kTwoTurns), &bundled(), options)), "A shell.<|im_end|>|");
}

// The tokens before the first label are the prompt that `kilin chat` would feed.
TEST(ChatData, the_prompt_is_that_of_the_engine) {
  const ChatExample e = only(
      R"({"messages": [{"role": "user", "content": "What is é?\n"}, {"role": "assistant", "content": "A letter."}]})");
  const std::vector<text::ChatMessage> messages{{"user", "What is é?\n"}};
  const Ids prompt = tokenizer().encode(bundled().render(messages, true));
  ASSERT_LT(prompt.size(), e.tokens.size());
  EXPECT_TRUE(std::equal(prompt.begin(), prompt.end(), e.tokens.begin()));
  for (size_t i = 0; i + 1 < prompt.size(); ++i) EXPECT_EQ(e.labels[i], -1);
  EXPECT_EQ(e.labels[prompt.size() - 1], e.tokens[prompt.size()]);
}

TEST(ChatData, completions_stand_between_bos_and_eos) {
  const ChatExample e = only(R"({"prompt": "The name is", "completion": " sh"})", nullptr);
  Ids expected{*tokenizer().bos_id()};
  for (const char* part : {"The name is", " sh"}) {
    for (const int32_t id : tokenizer().encode(part)) expected.push_back(id);
  }
  expected.push_back(*tokenizer().eos_id());
  EXPECT_EQ(e.tokens, expected);
  EXPECT_EQ(learnt(e), " sh[EOS]|");
  const ChatExample special = only(R"({"prompt": "<|im_user|>x", "completion": "y"})", nullptr);
  EXPECT_EQ(special.tokens.front(), *tokenizer().token_to_id("<|im_user|>"));
}

constexpr const char* kPair = R"({"prompt": "a", "completion": " b c d e f g h"})";

TEST(ChatData, long_examples_are_cut_dropped_or_refused) {
  const size_t full = only(kPair).tokens.size();
  ChatDataOptions options;
  options.max_tokens = static_cast<int64_t>(full);
  EXPECT_EQ(only(kPair, nullptr, options).tokens.size(), full);
  options.max_tokens = 4;
  const ChatData data = parse_chat_data(kPair, "d", tokenizer(), nullptr, options);
  EXPECT_EQ(data.cut, 1);
  EXPECT_EQ(data.examples.at(0).tokens.size(), 4u);
  EXPECT_EQ(learnt(data.examples.at(0)), " b c|");
  EXPECT_EQ(data.counted, 2);
  options.max_tokens = 2;  // [BOS] a: nothing is left to learn
  EXPECT_EQ(error_of(kPair, nullptr, options),
            "d.jsonl: none of the 1 records has an answer within 2 tokens");
  options.too_long = TooLong::kDrop;
  const std::string both = std::string(kPair) + "\n" + R"({"prompt": "", "completion": "b"})";
  options.max_tokens = 3;
  const ChatData dropped = parse_chat_data(both, "d", tokenizer(), nullptr, options);
  EXPECT_EQ(dropped.dropped, 1);
  EXPECT_EQ(dropped.examples.at(0).line, 2);
  options.too_long = TooLong::kRefuse;
  EXPECT_EQ(error_of(both, nullptr, options),
            "d.jsonl:1: found " + std::to_string(full) + " tokens, expected at most 3");
}

TEST(ChatData, errors_name_file_line_and_key) {
  const std::string good = R"({"prompt": "a", "completion": "b"})";
  expect_error(
      "d.jsonl:2: key 'messages[0].role': found \"tool\", expected \"system\" or \"user\" or \"assistant\"",
      good + "\n" + R"({"messages": [{"role": "tool", "content": ""}]})");
  expect_error("d.jsonl:1: key 'messages[0].content': found 3, expected a string",
               R"({"messages": [{"role": "user", "content": 3}]})");
  expect_error("d.jsonl:1: key 'messages[0].name': expected only 'role' and 'content' in a message",
               R"({"messages": [{"role": "assistant", "content": "x", "name": "y"}]})");
  expect_error(
      "d.jsonl:1: key 'messages': found an array of 1, expected at least one message of the assistant",
      R"({"messages": [{"role": "user", "content": "x"}]})");
  expect_error("d.jsonl:1: key 'messages[1].content': found \"\", expected a text that is not empty",
               R"({"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": ""}]})");
  expect_error(
      "d.jsonl:1: key 'messages[0].content': found the special token '<|im_end|>' in the text",
      R"({"messages": [{"role": "user", "content": "x<|im_end|>"}, {"role": "assistant", "content": "y"}]})");
  expect_error("d.jsonl:1: key 'tools': ", R"({"messages": [], "tools": [{}]})");
  expect_error("d.jsonl:1: found neither, expected either key 'messages' or keys", R"({"text": "a"})");
  expect_error("d.jsonl:1: found both, expected either", R"({"messages": [], "prompt": "a"})");
  expect_error("d.jsonl:1: key 'completion': missing, expected a string", R"({"prompt": "a"})");
  expect_error("d.jsonl:1: key 'completion': found \"\", expected a text that",
               R"({"prompt": "a", "completion": ""})");
  expect_error("d.jsonl:1: line 1, column ", "{\"prompt\": ");
  expect_error("d.jsonl: found no records", "\n");
  expect_error("d.jsonl:1: key 'messages': the model has no chat template, expected one", one_line(kTwoTurns),
               nullptr);
}

constexpr const char* kFrame =
    "{% for m in messages %}<|im_user|>{{ m.role }}<|im_middle|>{{ m.content }}<|im_end|>";

TEST(ChatData, templates_that_break_the_prefix_property_are_named) {
  // The question ends in another way than the answer begins.
  const ChatTemplate other(
      "t", std::string(kFrame) + "{% endfor %}{% if add_generation_prompt %}Answer: {% endif %}");
  expect_error("d.jsonl:1: the chat template breaks the prefix property: the text that asks for message 2",
               one_line(kTwoTurns), &other);
  // Earlier answers lose their text once the conversation goes on.
  const ChatTemplate forgets("t",
                             "{% for m in messages %}<|im_user|>{% if m.role != 'assistant' or loop.last "
                             "%}{{ m.content }}{% endif %}"
                             "<|im_end|>{% endfor %}{% if add_generation_prompt %}<|im_user|>{% endif %}");
  expect_error("d.jsonl:1: the chat template breaks the prefix property: the text of messages 0 to 2",
               one_line(kTwoTurns), &forgets);
  ChatDataOptions last;
  last.last_answer_only = true;
  EXPECT_EQ(learnt(only(one_line(kTwoTurns), &forgets, last)), "A shell.<|im_end|>|");
  // Without a special token between question and answer, tokens join over the edge.
  const ChatTemplate joins("t", "{% for m in messages %}{{ m.content }}{% endfor %}");
  expect_error(
      "d.jsonl:1: the chat template breaks the prefix property: where an answer begins or ends a token",
      R"({"messages": [{"role": "user", "content": "ker"}, {"role": "assistant", "content": "nel"}]})",
      &joins);
  // The template does not show answers at all.
  const ChatTemplate mute(
      "t", "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}");
  expect_error("d.jsonl:1: the chat template shows nothing of the answer in message 2", one_line(kTwoTurns),
               &mute);
}

}  // namespace
}  // namespace kilin::train
