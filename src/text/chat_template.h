// SPDX-License-Identifier: Apache-2.0
// Conversations as the text that a chat model was trained on, by the checkpoint's own Jinja template: the
// same text as transformers' apply_chat_template(tokenize=False).
#pragma once
#include <filesystem>
#include <nlohmann/json.hpp>
#include <optional>
#include <span>
#include <string>

#include "text/jinja.h"
#include "text/tokenizer.h"

namespace kilin::text {

using OrderedJson = nlohmann::ordered_json;  // templates print keys in the order they came

struct ChatMessage {
  std::string role, content;
};

// Jinja sources: the template, and that for conversations with tools of a checkpoint that has one of its own.
struct ChatTemplateText {
  std::string text;
  std::optional<std::string> tools;
};

class ChatTemplate {
 public:
  // chat_template.jinja, else chat_template of tokenizer_config.json; nothing when there is neither.
  // bos_token and its like come from tokenizer_config.json.
  static std::optional<ChatTemplate> load(const std::filesystem::path& model_dir);
  // Their sources alone.
  static std::optional<ChatTemplateText> load_text(const std::filesystem::path& model_dir);
  // tokenizer.chat_template of a GGUF file; nothing when there is none. `tokenizer`: that of the file.
  static std::optional<ChatTemplate> from_gguf(const io::GgufFile& file, const Tokenizer& tokenizer);

  ChatTemplate(std::string name, std::string source, OrderedJson variables = OrderedJson::object());

  // `extra`: an object of further variables, over the template's own. Error with Jinja's message and line.
  std::string render(std::span<const ChatMessage> messages, bool add_generation_prompt,
                     const OrderedJson& extra = OrderedJson::object()) const;
  // Messages as in OpenAI's API: an array of objects; tools: an array, or null for none.
  std::string render_json(const OrderedJson& messages, const OrderedJson& tools, bool add_generation_prompt,
                          const OrderedJson& extra = OrderedJson::object()) const;

 private:
  JinjaTemplate template_;
  std::optional<JinjaTemplate> tool_template_;  // of a checkpoint that has one of its own for tools
  OrderedJson variables_;
  bool sort_tools_ = false;  // Kimi's TikTokenTokenizer sorts the keys of tools, all the way down
};

}  // namespace kilin::text
