// SPDX-License-Identifier: Apache-2.0
#include "text/chat_template.h"

#include <gtest/gtest.h>

#include <fstream>
#include <thread>

#include "base/error.h"

namespace kilin::text {
namespace {

const std::filesystem::path kSource = KILIN_SOURCE_DIR;

std::string error_of(const std::string& source) {
  try {
    const ChatMessage message{"user", "hi"};
    return "no error: " + ChatTemplate("t", source).render({&message, 1}, true);
  } catch (const Error& error) {
    return error.what();
  }
}

TEST(ChatTemplate, gives_the_text_of_transformers) {
  std::ifstream file(kSource / "tests/data/tokenizer/chat_cases.json");
  const OrderedJson cases = OrderedJson::parse(file);
  ASSERT_GT(cases.size(), 30u);
  for (const OrderedJson& one : cases) {
    const ChatTemplate chat(one["name"], one["template"]);
    const auto render = [&] {
      return chat.render_json(one["messages"], one["tools"], one["add_generation_prompt"], one["extra"]);
    };
    if (one.contains("text")) {
      EXPECT_EQ(render(), one["text"].get<std::string>()) << one["name"];
      continue;
    }
    try {
      ADD_FAILURE() << one["name"] << " gave " << render();
    } catch (const Error& error) {
      EXPECT_NE(std::string(error.what()).find(one["error"].get<std::string>()), std::string::npos)
          << error.what();
    }
  }
}

TEST(ChatTemplate, of_the_bundled_checkpoint_frames_each_message) {
  const auto chat = ChatTemplate::load(kSource / "models/kilin-docs-10m");
  ASSERT_TRUE(chat.has_value());
  const std::vector<ChatMessage> messages = {{"system", "Be brief."}, {"user", "Grüße\n"}};
  EXPECT_EQ(chat->render(messages, true),
            "<|im_system|>system<|im_middle|>Be brief.<|im_end|><|im_user|>user<|im_middle|>Grüße\n<|im_end|>"
            "<|im_assistant|>assistant<|im_middle|>");
  EXPECT_EQ(chat->render({}, false), "");
}

TEST(ChatTemplate, a_directory_without_one_has_none) {
  EXPECT_FALSE(ChatTemplate::load(kSource / "tests/data/tokenizer").has_value());
}

TEST(ChatTemplate, errors_name_the_template_the_line_and_jinjas_message) {
  EXPECT_EQ(error_of("a\n\n{{ raise_exception('no\n good') }}"), "t: line 3: no good");
  EXPECT_EQ(error_of("{{ 1 }}\n{% if %}"), "t: line 2: Expected an expression, got 'end of statement block'");
  EXPECT_EQ(error_of("\n{{ x.y.z }}"), "t: line 2: 'x' is undefined");
  EXPECT_EQ(error_of("{{ 1 / 0 }}"), "t: line 1: ZeroDivisionError: division by zero");
}

TEST(ChatTemplate, text_that_is_not_utf8_is_an_error) {
  const ChatMessage message{"user", "\xFF"};
  EXPECT_THROW(ChatTemplate("t", "{{ messages }}").render({&message, 1}, true), Error);
}

TEST(ChatTemplate, renders_from_several_threads) {
  const ChatTemplate chat("t", "{% for m in messages %}{{ m.content }};{% endfor %}");
  std::vector<std::thread> threads;
  for (int i = 0; i < 4; ++i) {
    threads.emplace_back([&chat, i] {
      const std::vector<ChatMessage> messages(10, {"user", std::to_string(i)});
      std::string expected;
      for (int k = 0; k < 10; ++k) expected += std::to_string(i) + ";";
      for (int k = 0; k < 50; ++k) EXPECT_EQ(chat.render(messages, true), expected);
    });
  }
  for (std::thread& thread : threads) thread.join();
}

}  // namespace
}  // namespace kilin::text
