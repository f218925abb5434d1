// SPDX-License-Identifier: Apache-2.0
// Private to the reader and the writer of tokenizers in GGUF files.
#pragma once
#include <array>
#include <cstdint>
#include <string_view>

#include "text/split_pattern.h"

namespace kilin::text {

inline constexpr const char* kModelKey = "tokenizer.ggml.model";
inline constexpr const char* kPreKey = "tokenizer.ggml.pre";
inline constexpr const char* kTokensKey = "tokenizer.ggml.tokens";
inline constexpr const char* kTypesKey = "tokenizer.ggml.token_type";
inline constexpr const char* kMergesKey = "tokenizer.ggml.merges";
inline constexpr const char* kBosKey = "tokenizer.ggml.bos_token_id";
inline constexpr const char* kEosKey = "tokenizer.ggml.eos_token_id";
inline constexpr const char* kUnkKey = "tokenizer.ggml.unknown_token_id";
inline constexpr const char* kPadKey = "tokenizer.ggml.padding_token_id";

inline constexpr const char* kToolTemplateKey = "tokenizer.chat_template.tool_use";
inline constexpr const char* kTemplateNamesKey = "tokenizer.chat_templates";  // but the default's

inline constexpr std::string_view kByteLevelModel = "gpt2";  // of whatever pattern
inline constexpr std::string_view kKimiPre = "kimi-k2";
inline constexpr std::string_view kTikTokenClass = "TikTokenTokenizer";
inline constexpr std::string_view kFastClass = "PreTrainedTokenizerFast";

enum : int64_t {  // llama_token_type
  kNormalToken = 1,
  kUnknownToken,
  kControlToken,
  kUserDefinedToken,
  kUnusedToken,
  kByteToken,
};

struct GgufPattern {
  std::string_view pre, pattern;
  bool whole_first;  // see BytePairEncoder
};
inline const std::array<GgufPattern, 2> kGgufPatterns = {
    {{kKimiPre, kKimiPattern, true}, {"gpt-2", kGpt2Pattern, false}}};

}  // namespace kilin::text
