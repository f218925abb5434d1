// SPDX-License-Identifier: Apache-2.0
// Tokenizers in the metadata of GGUF files (keys tokenizer.ggml.*, as llama.cpp reads and its converters
// write them) and the way back to the files of Hugging Face.
//
// GGUF knows byte-level BPE as tokenizer.ggml.model "gpt2"; tokenizer.ggml.pre names the pattern that splits
// text: "kimi-k2" (Kimi's) and "gpt-2" are those that Kilin has. Two facts about a tokenizer have no key of
// ggml's. A piece of text that is a token is taken whole with "kimi-k2", as tiktoken does, and not with
// "gpt-2". And Kimi's TikTokenTokenizer cuts long text: "kilin.tokenizer_class" says whether the tokenizer
// was one; without that key a "kimi-k2" tokenizer was.
#pragma once
#include <optional>
#include <string>
#include <string_view>

#include "io/gguf.h"
#include "io/gguf_writer.h"
#include "text/chat_template.h"
#include "text/tokenizer.h"

namespace kilin::text {

inline constexpr const char* kGgufTokenizerClassKey = "kilin.tokenizer_class";
inline constexpr const char* kGgufChatTemplateKey = "tokenizer.chat_template";

// Tokens of type "unused" ([PADi] of the converters) are holes, of type "control" special added tokens, of
// type "user defined" added tokens that are not special. Errors name the file and the key.
TokenizerParts parse_gguf_tokenizer(const io::GgufFile& file);

// The metadata of a tokenizer: tokens filled up with [PADi] to the model's vocab_size, their types, merges,
// and the ids of bos, eos, unk and pad. Merges that all have a rank of their own (tokenizer.json) are written
// as they are; of those that a ranked vocabulary implies, the one of each token that encoding can reach, as
// llama.cpp's converter does. Error for what GGUF cannot say: another split pattern, added tokens that take
// white space along, tokens that are only taken whole where the reader would not take them so.
//
// Unlike llama.cpp's converter, an added token that is not special keeps that: it is written as user defined.
void write_gguf_tokenizer(const TokenizerParts& parts, int32_t vocab_size, io::GgufWriter& writer);

// tokenizer.chat_template and, of a file that has one for tools, tokenizer.chat_template.tool_use.
std::optional<ChatTemplateText> gguf_chat_template(const io::GgufFile& file);
void write_gguf_chat_template(const ChatTemplateText& chat_template, io::GgufWriter& writer);

// "TikTokenTokenizer" or "PreTrainedTokenizerFast".
std::string_view gguf_tokenizer_class(const io::GgufFile& file);

// The texts of a Hugging Face directory's tokenizer.json and tokenizer_config.json. The latter has the chat
// template too, when there is one; chat_template.jinja is the same text as a file. A tokenizer.json cannot
// say that long text is cut (text/long_text.h).
struct HuggingFaceTokenizer {
  std::string tokenizer_json;
  std::string tokenizer_config_json;
};
HuggingFaceTokenizer hugging_face_tokenizer(const TokenizerParts& parts,
                                            const std::optional<ChatTemplateText>& chat_template);

}  // namespace kilin::text
