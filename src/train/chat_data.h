// SPDX-License-Identifier: Apache-2.0
// Supervised data: JSONL records as tokens, with the loss on what the model is to say.
//
//   {"messages": [{"role": "system|user|assistant", "content": TEXT}, ...]}
//       the text of the checkpoint's chat template; every answer counts, with the mark that ends it
//   {"prompt": TEXT, "completion": TEXT}
//       [BOS] prompt completion [EOS], encoded one by one; the completion counts, and [EOS]. [BOS] is left
//       out where the prompt begins with a special token, as `kilin run` does.
//
// Other keys of a record are passed over, those that would change the text ("tools") are refused.
#pragma once
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "text/chat_template.h"
#include "text/tokenizer.h"

namespace kilin::train {

struct ChatExample {
  std::vector<int32_t> tokens;
  std::vector<int32_t> labels;  // what is to be predicted after tokens[i]; -1: nothing
  int64_t line = 0;             // of its record, from 1
};

// What happens to an example of more than max_tokens.
enum class TooLong {
  kCut,     // it loses its end; without a label left it is dropped
  kDrop,    // it is left out
  kRefuse,  // Error
};

struct ChatDataOptions {
  int64_t max_tokens = 0;  // 0: no limit
  TooLong too_long = TooLong::kCut;
  bool last_answer_only = false;  // of "messages": count the last answer alone
};

struct ChatData {
  std::vector<ChatExample> examples;
  int64_t tokens = 0;   // of all examples
  int64_t counted = 0;  // labels that are not -1
  int64_t cut = 0;      // examples that lost their end
  int64_t dropped = 0;  // records without an example
};

// `name` is what errors call the text: "NAME:LINE: key 'messages[1].content': ...". chat may be null when no
// record has "messages". Throws Error for what is no such record, for an empty answer to be learnt, for text
// that contains a special token, for a template that breaks the prefix property (chat_data.cc says which),
// and when no example is left.
ChatData parse_chat_data(std::string_view jsonl, const std::string& name, const text::Tokenizer& tokenizer,
                         const text::ChatTemplate* chat, const ChatDataOptions& options = {});
// The same of a file.
ChatData read_chat_data(const std::string& path, const text::Tokenizer& tokenizer,
                        const text::ChatTemplate* chat, const ChatDataOptions& options = {});

}  // namespace kilin::train
