// SPDX-License-Identifier: Apache-2.0
// The texts and token ids that evaluations read. `name` is what errors call the input: usually its path.
#pragma once
#include <cstdint>
#include <functional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace kilin::eval {

// Token ids separated by commas or white space. Throws Error for what is not a number and for an id outside
// the vocabulary.
std::vector<int32_t> parse_token_ids(std::string_view text, int64_t vocab_size, const std::string& name);

// One sequence of token ids per line; empty lines are skipped.
std::vector<std::vector<int32_t>> parse_id_lines(std::string_view text, int64_t vocab_size,
                                                 const std::string& name);

// Documents parted by a form feed. Throws Error for text that is not UTF-8.
std::vector<std::string> split_documents(std::string_view text, const std::string& name);

// One JSON object per line, the document being the string under `field`; empty lines are skipped.
std::vector<std::string> parse_jsonl(std::string_view text, const std::string& field,
                                     const std::string& name);

using Encode = std::function<std::vector<int32_t>(std::string_view)>;

// The stream [BOS] document [EOS] [BOS] document [EOS] ..., each document encoded on its own. An id of -1
// leaves that token out. Stops once the stream has `enough` tokens; 0: takes all documents.
std::vector<int32_t> token_stream(std::span<const std::string> documents, const Encode& encode,
                                  int32_t bos_id, int32_t eos_id, int64_t enough = 0);

}  // namespace kilin::eval
