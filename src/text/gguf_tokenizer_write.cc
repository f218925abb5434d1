// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <span>

#include "base/error.h"
#include "io/printable.h"
#include "text/byte_characters.h"
#include "text/gguf_tokenizer.h"
#include "text/gguf_tokenizer_keys.h"

namespace kilin::text {
namespace {

using io::printable;

bool ranks_are_unique(const std::vector<Merge>& by_rank) {
  const auto same_rank = [](const Merge& a, const Merge& b) { return a.rank == b.rank; };
  return std::adjacent_find(by_rank.begin(), by_rank.end(), same_rank) == by_rank.end();
}

// The ids that encoding of these bytes has come to when no merge below `limit` is left.
std::vector<int32_t> encode_below(std::string_view bytes, int32_t limit, const MergeTable& merges,
                                  const Vocabulary& vocabulary) {
  std::vector<int32_t> ids;
  for (size_t i = 0; i < bytes.size(); ++i) ids.push_back(vocabulary.find(bytes.substr(i, 1)));
  for (;;) {
    MergeTable::Found best = {limit, -1};
    size_t at = 0;
    for (size_t i = 0; i + 1 < ids.size(); ++i) {
      const MergeTable::Found found = merges.find(ids[i], ids[i + 1]);
      if (found.rank < best.rank) best = found, at = i;
    }
    if (best.result < 0) return ids;
    ids[at] = best.result;
    ids.erase(ids.begin() + static_cast<ptrdiff_t>(at) + 1);
  }
}

// A merge for each token, in the order of their ranks. A ranked vocabulary implies several for a token, of
// which encoding reaches one: what the token's own bytes come to below its rank. Where that is not a pair (a
// token that needs a later one), all stay.
std::vector<Merge> listed_merges(const TokenizerParts& parts) {
  std::vector<Merge> merges = parts.merges;
  std::stable_sort(merges.begin(), merges.end(),
                   [](const Merge& a, const Merge& b) { return a.rank < b.rank; });
  if (ranks_are_unique(merges)) return merges;
  const MergeTable table(merges);
  const Vocabulary vocabulary(parts.tokens);
  std::vector<Merge> listed;
  for (size_t begin = 0, end = 0; begin < merges.size(); begin = end) {
    while (end < merges.size() && merges[end].rank == merges[begin].rank) ++end;
    const std::span<const Merge> same(merges.data() + begin, end - begin);
    const auto ids = encode_below(vocabulary.bytes(same[0].result), same[0].rank, table, vocabulary);
    const auto reached = std::find_if(same.begin(), same.end(), [&](const Merge& merge) {
      return ids.size() == 2 && merge.left == ids[0] && merge.right == ids[1];
    });
    if (reached != same.end()) {
      listed.push_back(*reached);
    } else {
      listed.insert(listed.end(), same.begin(), same.end());
    }
  }
  return listed;
}

// Whether to take a piece of text whole does not matter when merges lead to every token anyway.
void check_whole_first(const TokenizerParts& parts, const GgufPattern& pattern) {
  if (parts.whole_first == pattern.whole_first) return;
  const Vocabulary vocabulary(parts.tokens);
  const MergeTable merges(parts.merges);
  for (int32_t id = 0; id < vocabulary.size(); ++id) {
    const std::string_view bytes = vocabulary.bytes(id);
    check(encode_below(bytes, INT32_MAX, merges, vocabulary).size() <= 1,
          "tokenizer: token {} ('{}'): no merges lead to it, so that ids would depend on whether a piece of "
          "text that is a token is taken whole; it is {}taken so here, and is {}with GGUF's '{}'",
          id, printable(bytes), parts.whole_first ? "" : "not ", pattern.whole_first ? "" : "not ",
          pattern.pre);
  }
}

const GgufPattern& pattern_of(const TokenizerParts& parts) {
  for (const GgufPattern& pattern : kGgufPatterns) {
    if (parts.split_patterns.size() == 1 && parts.split_patterns[0] == pattern.pattern) return pattern;
  }
  fail("tokenizer: found {}, expected Kimi's split pattern or GPT-2's, the only ones Kilin can name in GGUF",
       parts.split_patterns.size() == 1
           ? fmt::format("the split pattern '{}'", printable(parts.split_patterns[0]))
           : fmt::format("{} split patterns", parts.split_patterns.size()));
}

struct Tokens {
  std::vector<std::string> texts;
  std::vector<int32_t> types;
};

Tokens listed_tokens(const TokenizerParts& parts, int32_t vocab_size) {
  const auto size = static_cast<size_t>(vocab_size);
  check(parts.tokens.size() <= size, "tokenizer: found {} tokens, expected at most the model's {}",
        parts.tokens.size(), size);
  Tokens tokens;
  for (size_t id = 0; id < size; ++id) {
    const bool hole = id >= parts.tokens.size() || parts.tokens[id].empty();
    tokens.texts.push_back(hole ? fmt::format("[PAD{}]", id)
                                : ByteCharacters::get().to_characters(parts.tokens[id]));
    tokens.types.push_back(hole ? kUnusedToken : kNormalToken);
  }
  for (const AddedToken& token : parts.added) {
    check(token.id >= 0 && token.id < vocab_size,
          "tokenizer: added token '{}': found id {}, expected one below the model's {}",
          printable(token.content), token.id, vocab_size);
    check(!token.lstrip && !token.rstrip,
          "tokenizer: added token '{}': takes white space along (lstrip, rstrip), which GGUF cannot say",
          printable(token.content));
    const auto id = static_cast<size_t>(token.id);
    tokens.texts[id] = token.content;
    tokens.types[id] = token.special ? kControlToken : kUserDefinedToken;
  }
  return tokens;
}

std::vector<std::string> merge_texts(const TokenizerParts& parts, const std::vector<Merge>& merges) {
  const auto text = [&](int32_t id) {
    return ByteCharacters::get().to_characters(parts.tokens[static_cast<size_t>(id)]);
  };
  std::vector<std::string> texts;
  for (const Merge& merge : merges) texts.push_back(text(merge.left) + " " + text(merge.right));
  return texts;
}

}  // namespace

void write_gguf_tokenizer(const TokenizerParts& parts, int32_t vocab_size, io::GgufWriter& writer) {
  const GgufPattern& pattern = pattern_of(parts);
  check_whole_first(parts, pattern);
  const Tokens tokens = listed_tokens(parts, vocab_size);
  writer.add_string(kModelKey, kByteLevelModel);
  writer.add_string(kPreKey, pattern.pre);
  writer.add_strings(kTokensKey, tokens.texts);
  writer.add_int32s(kTypesKey, tokens.types);
  writer.add_strings(kMergesKey, merge_texts(parts, listed_merges(parts)));
  const Tokenizer tokenizer{TokenizerParts(parts)};
  const std::pair<const char*, std::optional<int32_t>> named[] = {{kBosKey, tokenizer.bos_id()},
                                                                  {kEosKey, tokenizer.eos_id()},
                                                                  {kUnkKey, tokenizer.unk_id()},
                                                                  {kPadKey, tokenizer.pad_id()}};
  for (const auto& [key, id] : named) {
    if (id) writer.add_uint32(key, static_cast<uint32_t>(*id));
  }
  writer.add_string(kGgufTokenizerClassKey, parts.cut_long_text ? kTikTokenClass : kFastClass);
}

void write_gguf_chat_template(const ChatTemplateText& chat_template, io::GgufWriter& writer) {
  if (chat_template.tools) {
    writer.add_string(kToolTemplateKey, *chat_template.tools);
    writer.add_strings(kTemplateNamesKey, {"tool_use"});
  }
  writer.add_string(kGgufChatTemplateKey, chat_template.text);
}

}  // namespace kilin::text
