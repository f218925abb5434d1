// SPDX-License-Identifier: Apache-2.0
// The public API end to end on the bundled model: text in, the reference's text out.
#include <gtest/gtest.h>

#include "kilin/kilin.h"
#include "support/reference.h"

namespace kilin::testing {
namespace {

std::string golden_text(const std::string& name, const char* what) {
  return io::SafetensorsFile::open(reference_path("goldens/" + name + ".safetensors")).metadata().at(what);
}

TEST(GoldenText, prompts_become_the_reference_tokens_and_generate_the_reference_text) {
  const Model model = Model::load(bundled_model());
  for (const char* name : {"docs_prompt_7", "docs_prompt_chat"}) {
    const Golden golden(name);
    const auto ids = model.encode(golden_text(name, "prompt"));
    EXPECT_EQ(ids, golden.ids("input_ids")) << name;
    Sequence sequence = model.new_sequence();
    GenerateOptions options;
    options.max_tokens = 64;
    options.ignore_end_tokens = true;
    std::string streamed;
    options.on_text = [&](std::string_view piece) {
      streamed += piece;
      return true;
    };
    const GenerateResult result = model.generate(sequence, ids, options);
    EXPECT_EQ(result.ids, golden.ids("greedy_ids")) << name;
    EXPECT_EQ(model.decode_text(result.ids, false), golden_text(name, "greedy")) << name;
    EXPECT_EQ(streamed, result.text);
    EXPECT_EQ(result.text, model.decode_text(result.ids, true));
    EXPECT_EQ(result.finish_reason, "length");
  }
}

TEST(GoldenText, the_chat_template_renders_the_golden_prompt_and_the_answer_ends_at_the_end_of_turn) {
  const Model model = Model::load(bundled_model());
  const ChatMessage question{"user", "What is Unix?"};
  const std::string prompt = model.chat_prompt(std::span(&question, 1));
  EXPECT_EQ(prompt, golden_text("docs_prompt_chat", "prompt"));
  Sequence sequence = model.new_sequence();
  const GenerateResult result = model.generate(sequence, model.encode(prompt), {});
  EXPECT_EQ(result.text, "(Unix) A Unix command that is executed by a Unix shell.");
  EXPECT_EQ(result.finish_reason, "stop");
}

}  // namespace
}  // namespace kilin::testing
