// SPDX-License-Identifier: Apache-2.0
#include "eval/inputs.h"

#include <algorithm>
#include <charconv>
#include <nlohmann/json.hpp>

#include "base/error.h"
#include "text/utf8.h"

namespace kilin::eval {
namespace {

constexpr std::string_view kSeparators = ", \t\r\n";

// A few bytes of the input that a message can show on one line.
std::string shown(std::string_view text) {
  constexpr size_t kLimit = 32;
  std::string result;
  for (const char c : text.substr(0, kLimit)) result += c >= ' ' && c <= '~' ? c : '?';
  return text.size() > kLimit ? result + "..." : result;
}

template <class Use>
void for_each_line(std::string_view text, const Use& use) {
  int64_t number = 1;
  for (size_t begin = 0; begin < text.size(); ++number) {
    size_t end = text.find('\n', begin);
    if (end == std::string_view::npos) end = text.size();
    const std::string_view line = text.substr(begin, end - begin);
    if (line.find_first_not_of(" \t\r") != std::string_view::npos) use(line, number);
    begin = end + 1;
  }
}

int32_t parse_token_id(std::string_view word, int64_t vocab_size, const std::string& name) {
  int64_t id = 0;
  const auto [end, error] = std::from_chars(word.data(), word.data() + word.size(), id);
  const bool number = error != std::errc::invalid_argument && end == word.data() + word.size();
  check(number, "{}: found '{}', expected a token id", name, shown(word));
  check(error == std::errc{} && id >= 0 && id < vocab_size, "{}: found token id {}, expected 0 to {}", name,
        shown(word), vocab_size - 1);
  return static_cast<int32_t>(id);
}

}  // namespace

std::vector<int32_t> parse_token_ids(std::string_view text, int64_t vocab_size, const std::string& name) {
  std::vector<int32_t> ids;
  size_t begin = text.find_first_not_of(kSeparators);
  while (begin != std::string_view::npos) {
    const size_t end = std::min(text.find_first_of(kSeparators, begin), text.size());
    ids.push_back(parse_token_id(text.substr(begin, end - begin), vocab_size, name));
    begin = text.find_first_not_of(kSeparators, end);
  }
  return ids;
}

std::vector<std::vector<int32_t>> parse_id_lines(std::string_view text, int64_t vocab_size,
                                                 const std::string& name) {
  std::vector<std::vector<int32_t>> sequences;
  for_each_line(text, [&](std::string_view line, int64_t number) {
    const std::string where = fmt::format("{}, line {}", name, number);
    sequences.push_back(parse_token_ids(line, vocab_size, where));
    const size_t found = sequences.back().size();
    check(found >= 2, "{}: found {} token id{}, expected at least 2", where, found, found == 1 ? "" : "s");
  });
  check(!sequences.empty(), "{}: found no token ids, expected a line of them per sequence", name);
  return sequences;
}

std::vector<std::string> split_documents(std::string_view text, const std::string& name) {
  text::check_utf8(text, name);
  std::vector<std::string> documents;
  size_t begin = 0;
  while (true) {
    const size_t end = text.find('\f', begin);
    documents.emplace_back(text.substr(begin, end - begin));
    if (end == std::string_view::npos) return documents;
    begin = end + 1;
  }
}

std::vector<std::string> parse_jsonl(std::string_view text, const std::string& field,
                                     const std::string& name) {
  std::vector<std::string> documents;
  for_each_line(text, [&](std::string_view line, int64_t number) {
    const auto record = nlohmann::json::parse(line, nullptr, /*allow_exceptions=*/false);
    check(record.is_object(), "{}, line {}: found no JSON object, expected one per line", name, number);
    const auto found = record.find(field);
    check(found != record.end(), "{}, line {}: found no key '{}', expected the text under it", name, number,
          field);
    check(found->is_string(), "{}, line {}: key '{}': found {}, expected a string", name, number, field,
          found->type_name());
    documents.push_back(found->get<std::string>());
  });
  check(!documents.empty(), "{}: found no records, expected a JSON object per line", name);
  return documents;
}

std::vector<int32_t> token_stream(std::span<const std::string> documents, const Encode& encode,
                                  int32_t bos_id, int32_t eos_id, int64_t enough) {
  std::vector<int32_t> stream;
  for (const std::string& document : documents) {
    if (bos_id >= 0) stream.push_back(bos_id);
    const std::vector<int32_t> ids = encode(document);
    stream.insert(stream.end(), ids.begin(), ids.end());
    if (eos_id >= 0) stream.push_back(eos_id);
    if (enough > 0 && static_cast<int64_t>(stream.size()) >= enough) break;
  }
  return stream;
}

}  // namespace kilin::eval
