// SPDX-License-Identifier: Apache-2.0
#include "train/chat_data.h"

#include <algorithm>
#include <nlohmann/json.hpp>
#include <utility>

#include "base/error.h"
#include "io/json_lines.h"
#include "io/mapped_file.h"
#include "io/printable.h"

namespace kilin::train {
namespace {

using text::ChatMessage;

constexpr int32_t kNoLabel = -1;

// Appends tokens; `learn`: the model is to predict them.
void append(ChatExample& example, const std::vector<int32_t>& ids, bool learn) {
  for (const int32_t id : ids) {
    if (learn && !example.labels.empty()) example.labels.back() = id;
    example.tokens.push_back(id);
    example.labels.push_back(kNoLabel);
  }
}

// Someone's text that the tokenizer would read as structure would teach another conversation than was
// written.
void check_no_special(const text::Tokenizer& tokenizer, const std::string& content,
                      const io::JsonReader& record, const std::string& key) {
  for (const int32_t id : tokenizer.encode(content)) {
    check(!tokenizer.is_special(id), "{}: key '{}': found the special token '{}' in the text, expected none",
          record.file(), record.key_path(key), tokenizer.token_bytes(id));
  }
}

std::string content_of(const io::JsonReader& record, const std::string& key,
                       const text::Tokenizer& tokenizer) {
  std::string content = record.string(key);
  check_no_special(tokenizer, content, record, key);
  return content;
}

std::vector<ChatMessage> messages_of(const io::JsonReader& record, const text::Tokenizer& tokenizer) {
  if (record.has("tools")) record.refuse("tools", "no tools: they are not supported here");
  std::vector<ChatMessage> messages;
  for (const io::JsonReader& message : record.objects("messages")) {
    const std::string role = message.choice("role", {"system", "user", "assistant"});
    std::string content = content_of(message, "content", tokenizer);
    if (role == "assistant" && content.empty()) message.refuse("content", "a text that is not empty");
    for (const std::string& key : message.unread_keys()) {
      fail("{}: key '{}': expected only 'role' and 'content' in a message", record.file(), key);
    }
    messages.push_back({role, std::move(content)});
  }
  const bool answered = std::any_of(messages.begin(), messages.end(),
                                    [](const ChatMessage& m) { return m.role == "assistant"; });
  if (!answered) record.refuse("messages", "at least one message of the assistant");
  return messages;
}

// The prefix property: what the model reads before it answers must begin the text with the answer, and that
// the whole conversation. Otherwise it would be trained on a text that it never sees when it is used.
// Templates break it that rewrite earlier messages (dropping their reasoning, say) or begin an answer in
// another way than they show one.
class Renderer {
 public:
  Renderer(const text::Tokenizer& tokenizer, const text::ChatTemplate& chat, const std::string& place)
      : tokenizer_(tokenizer), chat_(chat), place_(place) {}

  ChatExample render(const std::vector<ChatMessage>& messages, bool last_answer_only) const {
    const std::string whole = chat_.render(messages, false);
    const size_t last = last_answer(messages);
    ChatExample example;
    size_t done = 0;  // bytes of `whole`
    for (size_t i = 0; i < messages.size(); ++i) {
      if (messages[i].role != "assistant" || (last_answer_only && i != last)) continue;
      const std::span<const ChatMessage> all(messages);
      const std::string before = chat_.render(all.first(i), true);
      const std::string after = i + 1 == messages.size() ? whole : chat_.render(all.first(i + 1), false);
      check(after.starts_with(before),
            "{}: the chat template breaks the prefix property: the text that asks for message {} ('...{}') "
            "does not "
            "begin the text with that answer ('...{}')",
            place_, i, end_of(before), end_of(after));
      check(whole.starts_with(after),
            "{}: the chat template breaks the prefix property: the text of messages 0 to {} ('...{}') does "
            "not begin "
            "the text of all {}: it rewrites earlier messages, so that not every answer can be learnt from "
            "one text",
            place_, i, end_of(after), messages.size());
      check(before.size() >= done && after.size() > before.size(),
            "{}: the chat template shows nothing of the answer in message {}", place_, i);
      append(example, tokenizer_.encode(std::string_view(whole).substr(done, before.size() - done)), false);
      append(example,
             tokenizer_.encode(std::string_view(whole).substr(before.size(), after.size() - before.size())),
             true);
      done = after.size();
    }
    append(example, tokenizer_.encode(std::string_view(whole).substr(done)), false);
    check(example.tokens == tokenizer_.encode(whole),
          "{}: the chat template breaks the prefix property: where an answer begins or ends a token stands "
          "on both "
          "sides, so that the tokens before the answer depend on it; expected a special token there",
          place_);
    return example;
  }

 private:
  static size_t last_answer(const std::vector<ChatMessage>& messages) {
    size_t last = 0;
    for (size_t i = 0; i < messages.size(); ++i) {
      if (messages[i].role == "assistant") last = i;
    }
    return last;
  }
  static std::string end_of(const std::string& text) {
    constexpr size_t kShown = 40;
    return io::printable(std::string_view(text).substr(text.size() - std::min(text.size(), kShown)));
  }

  const text::Tokenizer& tokenizer_;
  const text::ChatTemplate& chat_;
  const std::string& place_;
};

ChatExample completion_of(const io::JsonReader& record, const text::Tokenizer& tokenizer) {
  const std::string prompt = record.string("prompt");  // may hold special tokens, like that of `kilin run`
  const std::string completion = content_of(record, "completion", tokenizer);
  if (completion.empty()) record.refuse("completion", "a text that is not empty");
  const auto eos = tokenizer.eos_id();
  check(eos.has_value(), "{}: the tokenizer names no end token, expected one to end the completion with",
        record.file());
  ChatExample example;
  const std::vector<int32_t> ids = tokenizer.encode(prompt);
  const bool add_bos = tokenizer.bos_id() && (ids.empty() || !tokenizer.is_special(ids.front()));
  if (add_bos) append(example, {*tokenizer.bos_id()}, false);
  append(example, ids, false);
  if (example.tokens.empty()) record.refuse("prompt", "at least one token before the completion");
  append(example, tokenizer.encode(completion), true);
  append(example, {*eos}, true);
  return example;
}

ChatExample example_of(const io::JsonReader& record, const text::Tokenizer& tokenizer,
                       const text::ChatTemplate* chat, const ChatDataOptions& options) {
  const bool conversation = record.has("messages");
  const bool completion = record.has("prompt") || record.has("completion");
  check(conversation != completion,
        "{}: found {}, expected either key 'messages' or keys 'prompt' and 'completion'", record.file(),
        conversation ? "both" : "neither");
  if (completion) return completion_of(record, tokenizer);
  check(chat != nullptr, "{}: key 'messages': the model has no chat template, expected one for conversations",
        record.file());
  const auto messages = messages_of(record, tokenizer);
  return Renderer(tokenizer, *chat, record.file()).render(messages, options.last_answer_only);
}

int64_t counted_labels(const ChatExample& example) {
  return static_cast<int64_t>(
      std::count_if(example.labels.begin(), example.labels.end(), [](int32_t x) { return x != kNoLabel; }));
}

// False: leave the example out.
bool shorten(ChatExample& example, const ChatDataOptions& options, const std::string& place, ChatData& data) {
  const auto most = static_cast<size_t>(options.max_tokens);
  if (most == 0 || example.tokens.size() <= most) return true;
  check(options.too_long != TooLong::kRefuse, "{}: found {} tokens, expected at most {}", place,
        example.tokens.size(), most);
  if (options.too_long == TooLong::kDrop) return false;
  example.tokens.resize(most);
  example.labels.resize(most);
  example.labels.back() = kNoLabel;  // its token is gone
  if (counted_labels(example) == 0) return false;
  ++data.cut;
  return true;
}

}  // namespace

ChatData parse_chat_data(std::string_view jsonl, const std::string& name, const text::Tokenizer& tokenizer,
                         const text::ChatTemplate* chat, const ChatDataOptions& options) {
  check(options.max_tokens >= 0, "max_tokens: found {}, expected 0 or more", options.max_tokens);
  ChatData data;
  io::for_each_json_line(jsonl, name, [&](const io::JsonReader& record, int64_t line) {
    ChatExample example = example_of(record, tokenizer, chat, options);
    example.line = line;
    if (!shorten(example, options, record.file(), data)) {
      ++data.dropped;
      return;
    }
    data.tokens += static_cast<int64_t>(example.tokens.size());
    data.counted += counted_labels(example);
    data.examples.push_back(std::move(example));
  });
  check(!data.examples.empty(), "{}: none of the {} records has an answer within {} tokens", name,
        data.dropped, options.max_tokens);
  return data;
}

ChatData read_chat_data(const std::string& path, const text::Tokenizer& tokenizer,
                        const text::ChatTemplate* chat, const ChatDataOptions& options) {
  const io::MappedFile file(path);
  return parse_chat_data(file.text(), path, tokenizer, chat, options);
}

}  // namespace kilin::train
