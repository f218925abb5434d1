// SPDX-License-Identifier: Apache-2.0
#include "text/split_pattern.h"

#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>

#include <algorithm>
#include <map>

#include "base/error.h"
#include "text/split_pattern_parser.h"

namespace kilin::text {

const std::string_view kKimiPattern = R"([\p{Han}]+)"
                                      R"(|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*)"
                                      R"([\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?)"
                                      R"(|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+)"
                                      R"([\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?)"
                                      R"(|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+)";

const std::string_view kGpt2Pattern =
    R"('s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+)";

namespace {

constexpr size_t kMaxLetters = 256;

// Steps that PCRE2 may take for one match: some for each character, so that a long run is no error but a
// pattern that goes exponential is.
uint32_t match_limit(size_t characters) {
  return static_cast<uint32_t>(std::min<size_t>(10'000'000 + 64 * characters, UINT32_MAX));
}

const pcre2_code* as_code(const std::shared_ptr<const void>& code) {
  return static_cast<const pcre2_code*>(code.get());
}

std::string pcre2_message(int error) {
  PCRE2_UCHAR message[256];
  pcre2_get_error_message(error, message, sizeof(message));
  return reinterpret_cast<const char*>(message);
}

std::vector<CodePointSet> distinct_sets(const std::vector<PatternPart>& parts) {
  std::vector<CodePointSet> sets;
  for (const PatternPart& part : parts) {
    const auto* set = std::get_if<CodePointSet>(&part);
    if (set != nullptr && std::find(sets.begin(), sets.end(), *set) == sets.end()) sets.push_back(*set);
  }
  return sets;
}

// Which sets a code point is in, changed at each boundary where it enters or leaves one.
struct Boundary {
  char32_t at;
  size_t set;
};

std::vector<Boundary> boundaries_of(const std::vector<CodePointSet>& sets) {
  std::vector<Boundary> boundaries;
  for (size_t i = 0; i < sets.size(); ++i) {
    for (const CodePointRange& range : sets[i].ranges()) {
      boundaries.push_back({range.first, i});
      boundaries.push_back({range.last + 1, i});
    }
  }
  std::sort(boundaries.begin(), boundaries.end(), [](auto a, auto b) { return a.at < b.at; });
  return boundaries;
}

struct Alphabet {
  std::vector<uint8_t> letter_of;             // of each code point
  std::vector<std::vector<bool>> membership;  // of each letter, in which sets it is
};

Alphabet make_alphabet(const std::vector<CodePointSet>& sets) {
  Alphabet alphabet{std::vector<uint8_t>(kEndOfUnicode), {}};
  std::map<std::vector<bool>, size_t> letters;
  std::vector<bool> inside(sets.size());
  const std::vector<Boundary> boundaries = boundaries_of(sets);
  char32_t from = 0;
  for (size_t i = 0; from < kEndOfUnicode;) {
    for (; i < boundaries.size() && boundaries[i].at == from; ++i) {
      inside[boundaries[i].set] = !inside[boundaries[i].set];
    }
    const char32_t until = i < boundaries.size() ? boundaries[i].at : kEndOfUnicode;
    const auto [entry, added] = letters.try_emplace(inside, letters.size());
    if (added) alphabet.membership.push_back(inside);
    check(letters.size() <= kMaxLetters, "split pattern: its classes cut Unicode into more than {} kinds",
          kMaxLetters);
    std::fill(alphabet.letter_of.begin() + from, alphabet.letter_of.begin() + until,
              static_cast<uint8_t>(entry->second));
    from = until;
  }
  return alphabet;
}

std::string byte_class(const Alphabet& alphabet, size_t set) {
  std::string members;
  for (size_t letter = 0; letter < alphabet.membership.size(); ++letter) {
    if (alphabet.membership[letter][set]) members += fmt::format("\\x{:02x}", letter);
  }
  return members.empty() ? "(?!)" : "[" + members + "]";
}

std::string translate(const std::vector<PatternPart>& parts, const std::vector<CodePointSet>& sets,
                      const Alphabet& alphabet) {
  std::string text;
  for (const PatternPart& part : parts) {
    if (const auto* set = std::get_if<CodePointSet>(&part)) {
      const auto index = std::find(sets.begin(), sets.end(), *set) - sets.begin();
      text += byte_class(alphabet, static_cast<size_t>(index));
    } else {
      text += std::get<std::string>(part);
    }
  }
  return text;
}

std::shared_ptr<const void> compile(const std::string& pattern) {
  int error = 0;
  PCRE2_SIZE offset = 0;
  const uint32_t options = PCRE2_NO_AUTO_CAPTURE | PCRE2_DOLLAR_ENDONLY;
  pcre2_code* code = pcre2_compile(reinterpret_cast<PCRE2_SPTR>(pattern.data()), pattern.size(), options,
                                   &error, &offset, nullptr);
  check(code != nullptr, "split pattern: {}", pcre2_message(error));
  std::shared_ptr<const void> owner(
      code, [](const void* p) { pcre2_code_free(static_cast<pcre2_code*>(const_cast<void*>(p))); });
  pcre2_jit_compile(code, PCRE2_JIT_COMPLETE);  // where it cannot, PCRE2 interprets
  return owner;
}

// What one split() needs besides the shared code.
class Matcher {
 public:
  Matcher(const pcre2_code* code, std::string_view subject)
      : code_(code),
        subject_(subject),
        data_(pcre2_match_data_create(1, nullptr), pcre2_match_data_free),
        context_(pcre2_match_context_create(nullptr), pcre2_match_context_free) {
    check(data_ != nullptr && context_ != nullptr, "split pattern: out of memory");
    pcre2_set_match_limit(context_.get(), match_limit(subject.size()));
  }

  // Finds the first match at or after `from`; false when there is none.
  bool find(size_t from) {
    int rc = run(from, 0);
    if (rc == PCRE2_ERROR_JIT_STACKLIMIT) rc = run(from, PCRE2_NO_JIT);
    if (rc == PCRE2_ERROR_NOMATCH) return false;
    check(rc >= 0, "split pattern: character {} of {}: {}", from, subject_.size(), pcre2_message(rc));
    return true;
  }
  size_t begin() const { return pcre2_get_ovector_pointer(data_.get())[0]; }
  size_t end() const { return pcre2_get_ovector_pointer(data_.get())[1]; }

 private:
  int run(size_t from, uint32_t options) {
    return pcre2_match(code_, reinterpret_cast<PCRE2_SPTR>(subject_.data()), subject_.size(), from, options,
                       data_.get(), context_.get());
  }

  const pcre2_code* code_;
  std::string_view subject_;
  std::unique_ptr<pcre2_match_data, decltype(&pcre2_match_data_free)> data_;
  std::unique_ptr<pcre2_match_context, decltype(&pcre2_match_context_free)> context_;
};

// Takes pieces off the front of the text, counted in characters.
class PieceCutter {
 public:
  PieceCutter(std::string_view text, std::vector<std::string_view>& pieces) : rest_(text), pieces_(pieces) {}

  void cut_until(size_t character) {
    if (character == at_) return;
    size_t bytes = 0;
    for (; at_ < character; ++at_) bytes += utf8_length(rest_[bytes]);
    pieces_.push_back(rest_.substr(0, bytes));
    rest_.remove_prefix(bytes);
  }

 private:
  std::string_view rest_;
  size_t at_ = 0;
  std::vector<std::string_view>& pieces_;
};

}  // namespace

SplitPattern::SplitPattern(std::string_view pattern) {
  const std::vector<PatternPart> parts = parse_split_pattern(pattern);
  const std::vector<CodePointSet> sets = distinct_sets(parts);
  Alphabet alphabet = make_alphabet(sets);
  translated_ = translate(parts, sets, alphabet);
  alphabet_size_ = alphabet.membership.size();
  letter_of_ = std::move(alphabet.letter_of);
  code_ = compile(translated_);
}

std::string SplitPattern::in_alphabet(std::string_view text) const {
  std::string letters(text.size(), '\0');
  size_t count = 0;
  for (const char* at = text.data(); at != text.data() + text.size(); at += utf8_length(*at)) {
    letters[count++] = static_cast<char>(letter_of_[utf8_decode(at)]);
  }
  letters.resize(count);
  return letters;
}

void SplitPattern::split(std::string_view text, std::vector<std::string_view>& pieces) const {
  const std::string letters = in_alphabet(text);
  Matcher matcher(as_code(code_), letters);
  PieceCutter cutter(text, pieces);
  for (size_t from = 0; from < letters.size() && matcher.find(from);) {
    cutter.cut_until(matcher.begin());
    cutter.cut_until(matcher.end());
    from =
        matcher.end() + (matcher.end() == matcher.begin() ? 1 : 0);  // an empty match only parts two pieces
  }
  cutter.cut_until(letters.size());
}

}  // namespace kilin::text
