// SPDX-License-Identifier: Apache-2.0
#include <algorithm>

#include "base/error.h"
#include "text/byte_characters.h"
#include "text/gguf_tokenizer.h"
#include "text/json_fields.h"
#include "text/utf8.h"

namespace kilin::text {
namespace {

std::string quoted(const std::string& text) { return Json(text).dump(); }

OrderedJson flags_of(const AddedToken& token) {
  check(find_invalid_utf8(token.content) == std::string_view::npos,
        "tokenizer: added token {}: found bytes that are not UTF-8, expected UTF-8", token.id);
  return {{"content", token.content}, {"single_word", false},           {"lstrip", token.lstrip},
          {"rstrip", token.rstrip},   {"normalized", token.normalized}, {"special", token.special}};
}

std::vector<AddedToken> sorted_by_id(std::vector<AddedToken> tokens) {
  std::sort(tokens.begin(), tokens.end(), [](const auto& a, const auto& b) { return a.id < b.id; });
  return tokens;
}

OrderedJson pre_tokenizer_of(const TokenizerParts& parts) {
  OrderedJson stages = OrderedJson::array();
  for (const std::string& pattern : parts.split_patterns) {
    stages.push_back(
        {{"type", "Split"}, {"pattern", {{"Regex", pattern}}}, {"behavior", "Isolated"}, {"invert", false}});
  }
  stages.push_back(
      {{"type", "ByteLevel"}, {"add_prefix_space", false}, {"trim_offsets", false}, {"use_regex", false}});
  return {{"type", "Sequence"}, {"pretokenizers", stages}};
}

// The library numbers added tokens from the size of the vocabulary on, whatever ids the file gives them, so
// that a hole below the last token must be filled: with the [PADi] of GGUF files, which no text becomes.
std::string vocabulary_text(const TokenizerParts& parts, const std::vector<AddedToken>& added) {
  size_t size = parts.tokens.size();
  while (size > 0 && parts.tokens[size - 1].empty()) --size;
  if (!added.empty()) size = std::max(size, static_cast<size_t>(added.back().id) + 1);
  std::vector<bool> is_added(size);
  for (const AddedToken& token : added) is_added[static_cast<size_t>(token.id)] = true;
  std::string text = "{";
  for (size_t id = 0; id < size; ++id) {
    const bool hole = id >= parts.tokens.size() || parts.tokens[id].empty();
    if (hole && is_added[id]) continue;
    const std::string token =
        hole ? fmt::format("[PAD{}]", id) : ByteCharacters::get().to_characters(parts.tokens[id]);
    text += fmt::format("{}\n      {}: {}", text.size() > 1 ? "," : "", quoted(token), id);
  }
  return text + "\n    }";
}

std::string merges_text(const TokenizerParts& parts) {
  std::vector<Merge> merges = parts.merges;
  std::stable_sort(merges.begin(), merges.end(),
                   [](const Merge& a, const Merge& b) { return a.rank < b.rank; });
  const auto quoted_token = [&](int32_t id) {
    return quoted(ByteCharacters::get().to_characters(parts.tokens[static_cast<size_t>(id)]));
  };
  std::string text = "[";
  for (const Merge& merge : merges) {
    text += fmt::format("{}\n      [{}, {}]", text.size() > 1 ? "," : "", quoted_token(merge.left),
                        quoted_token(merge.right));
  }
  return text + "\n    ]";
}

std::string tokenizer_json(const TokenizerParts& parts, const std::vector<AddedToken>& added) {
  OrderedJson list = OrderedJson::array();
  for (const AddedToken& token : added) {
    OrderedJson entry = {{"id", token.id}};
    entry.update(flags_of(token));
    list.push_back(std::move(entry));
  }
  const OrderedJson decoder = {
      {"type", "ByteLevel"}, {"add_prefix_space", true}, {"trim_offsets", true}, {"use_regex", true}};
  std::string text = "{\n  \"version\": \"1.0\",\n  \"truncation\": null,\n  \"padding\": null,\n";
  text += "  \"added_tokens\": " + list.dump() + ",\n  \"normalizer\": null,\n";
  text += "  \"pre_tokenizer\": " + pre_tokenizer_of(parts).dump() + ",\n";
  text += "  \"post_processor\": null,\n  \"decoder\": " + decoder.dump() + ",\n";
  text += "  \"model\": {\n    \"type\": \"BPE\",\n    \"dropout\": null,\n    \"unk_token\": null,\n";
  text += "    \"continuing_subword_prefix\": null,\n    \"end_of_word_suffix\": null,\n";
  text += "    \"fuse_unk\": false,\n    \"byte_fallback\": false,\n";
  text += fmt::format("    \"ignore_merges\": {},\n", parts.whole_first);
  text += "    \"vocab\": " + vocabulary_text(parts, added) + ",\n";
  text += "    \"merges\": " + merges_text(parts) + "\n  }\n}\n";
  return text;
}

std::string chat_template_json(const ChatTemplateText& chat_template) {
  check_utf8(chat_template.text, "chat template");
  if (!chat_template.tools) return quoted(chat_template.text);
  check_utf8(*chat_template.tools, "chat template of tools");
  return fmt::format(R"([{{"name": "default", "template": {}}}, {{"name": "tool_use", "template": {}}}])",
                     quoted(chat_template.text), quoted(*chat_template.tools));
}

std::string tokenizer_config_json(const TokenizerParts& parts, const std::vector<AddedToken>& added,
                                  const std::optional<ChatTemplateText>& chat_template) {
  std::string decoder;
  for (const AddedToken& token : added) {
    decoder +=
        fmt::format("{}\n    \"{}\": {}", decoder.empty() ? "" : ",", token.id, flags_of(token).dump());
  }
  std::string text = "{\n  \"added_tokens_decoder\": {" + decoder + "\n  },\n";
  const std::pair<const char*, const std::string*> named[] = {{"bos_token", &parts.named.bos},
                                                              {"eos_token", &parts.named.eos},
                                                              {"pad_token", &parts.named.pad},
                                                              {"unk_token", &parts.named.unk}};
  for (const auto& [key, token] : named) {
    check_utf8(*token, key);
    if (!token->empty()) text += fmt::format("  \"{}\": {},\n", key, quoted(*token));
  }
  if (chat_template) {
    text += "  \"chat_template\": " + chat_template_json(*chat_template) + ",\n";
  }
  text += "  \"clean_up_tokenization_spaces\": false,\n";
  return text + "  \"tokenizer_class\": \"PreTrainedTokenizerFast\"\n}\n";
}

}  // namespace

HuggingFaceTokenizer hugging_face_tokenizer(const TokenizerParts& parts,
                                            const std::optional<ChatTemplateText>& chat_template) {
  const std::vector<AddedToken> added = sorted_by_id(parts.added);
  return {tokenizer_json(parts, added), tokenizer_config_json(parts, added, chat_template)};
}

}  // namespace kilin::text
