// SPDX-License-Identifier: Apache-2.0
// A conversation with a model: the messages, and the sequence that has read them.
#pragma once
#include <kilin/kilin.h>

#include <cstdint>
#include <string>
#include <vector>

namespace kilin::cli {

class ChatSession {
 public:
  // `options` holds sampling, the longest answer and the callbacks of every answer.
  ChatSession(Model model, std::string system, GenerateOptions options);

  // Adds the user's message and the answer. If that fails, the conversation is as before.
  GenerateResult answer(const std::string& user);

  void reset();                         // forgets all messages but the system message
  void set_system(std::string system);  // and forgets all messages
  const std::vector<ChatMessage>& messages() const { return messages_; }
  int64_t tokens() const { return sequence_.length(); }
  // Prompt tokens of the last answer that had to be computed: the others were known from before.
  int64_t fed() const { return fed_; }

 private:
  std::vector<int32_t> tokens_to_feed(const std::vector<int32_t>& rendered);

  Model model_;
  std::string system_;
  GenerateOptions options_;
  std::vector<ChatMessage> messages_;
  Sequence sequence_;
  std::vector<int32_t> known_;  // the tokens in sequence_
  int64_t fed_ = 0;
  uint64_t answers_ = 0;
};

}  // namespace kilin::cli
