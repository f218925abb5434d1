// SPDX-License-Identifier: Apache-2.0
// The files that describe a tokenizer, each read into TokenizerParts. Errors do not name the file: load does.
#pragma once
#include <string_view>

#include "text/json_fields.h"
#include "text/tokenizer.h"

namespace kilin::text {

// tokenizer.json of Hugging Face tokenizers. What would change ids and is not implemented is an Error naming
// the key.
TokenizerParts parse_tokenizer_json(std::string_view text);

// tiktoken.model: lines of a token in base64 and its rank. `config` is the tokenizer_config.json, or null.
TokenizerParts parse_tiktoken(std::string_view text, const Json& config);

// bos_token and its like, of a tokenizer_config.json or a special_tokens_map.json; fills only what is still
// empty.
void read_named_tokens(const Json& config, NamedTokens& named);

}  // namespace kilin::text
