// SPDX-License-Identifier: Apache-2.0
#include "text/split_pattern_parser.h"

#include <cctype>
#include <optional>

#include "base/error.h"

namespace kilin::text {
namespace {

constexpr size_t kMaxPattern = 1 << 16;
constexpr int kMaxDepth = 100;
constexpr int kMaxRepeat = 1000;  // keeps the compiled pattern small

class Parser {
 public:
  explicit Parser(std::string_view pattern) : pattern_(pattern) {}

  std::vector<PatternPart> parse() {
    while (!at_end()) parse_item();
    if (!fold_stack_.empty()) bad("a group is not closed");
    return std::move(parts_);
  }

 private:
  [[noreturn]] void bad(std::string_view reason) const {
    fail("split pattern, byte {}: {}, in: {}", at_, reason, pattern_.substr(0, 400));
  }

  bool at_end() const { return at_ == pattern_.size(); }
  char peek(size_t ahead = 0) const { return at_ + ahead < pattern_.size() ? pattern_[at_ + ahead] : '\0'; }
  bool starts(std::string_view text) const { return pattern_.substr(at_).starts_with(text); }
  bool take(std::string_view text) {
    if (!starts(text)) return false;
    at_ += text.size();
    return true;
  }

  char32_t take_code_point() {
    if (at_end()) bad("ends too early");
    const char32_t code_point = utf8_decode(pattern_.data() + at_);
    at_ += utf8_length(pattern_[at_]);
    return code_point;
  }

  void emit(std::string text) { parts_.emplace_back(std::move(text)); }
  void emit(CodePointSet set) { parts_.emplace_back(std::move(set)); }

  CodePointSet folded(const CodePointSet& set) const {
    if (!fold_) return set;
    try {
      return set.fold_case();
    } catch (const Error& error) {
      bad(error.what());
    }
  }

  void parse_item() {
    const char c = peek();
    if (c == '(') return open_group();
    if (c == ')') return close_group();
    if (c == '|') {
      ++at_;
      quantifiable_ = false;
      return emit("|");
    }
    if (c == '*' || c == '+' || c == '?' || c == '{') return parse_quantifier();
    if (c == '^' || c == '$') bad("anchors are not supported");
    parse_atom();
    quantifiable_ = true;
  }

  void parse_atom() {
    if (peek() == '[') {
      emit(parse_class(0));
    } else if (peek() == '\\') {
      emit(folded(parse_escape().set));
    } else if (take(".")) {
      emit(CodePointSet::of('\n').complement());
    } else {
      if (peek() == ']' || peek() == '}') {
        bad("a closing bracket without its opening one, write it with a backslash");
      }
      emit(folded(CodePointSet::of(take_code_point())));
    }
  }

  void open_group() {
    if (fold_stack_.size() == kMaxDepth) bad("too deeply nested");
    fold_stack_.push_back(fold_);
    quantifiable_ = false;
    for (const std::string_view opening : {"(?:", "(?=", "(?!", "(?>"}) {
      if (take(opening)) return emit(std::string(opening));
    }
    if (take("(?i:") || take("(?-i:")) {
      fold_ = pattern_[at_ - 3] != '-';
    } else if (at_ == 0 && take("(?i)")) {  // further on, Rust and Oniguruma differ in how far it reaches
      fold_stack_.pop_back();
      fold_ = true;
      return;
    } else if (starts("(?")) {
      bad("this kind of group is not supported");
    } else {
      ++at_;
    }
    emit("(?:");
  }

  void close_group() {
    if (fold_stack_.empty()) bad("')' without '('");
    fold_ = fold_stack_.back();
    fold_stack_.pop_back();
    ++at_;
    emit(")");
    quantifiable_ = true;
  }

  void parse_quantifier() {
    if (!quantifiable_) bad("a quantifier without anything before it");
    std::string quantifier;
    if (take("{")) {
      quantifier = parse_counts();
    } else {
      quantifier = pattern_.substr(at_++, 1);
    }
    // "{1,3}+" is possessive to Rust's fancy-regex and a plus of its own to Oniguruma.
    if (peek() == '+' && quantifier.size() > 1) bad("'+' after '}' is not supported");
    if (peek() == '+' || peek() == '?') quantifier += pattern_[at_++];
    emit(std::move(quantifier));
    quantifiable_ = false;
  }

  std::string parse_counts() {
    const std::optional<int> low = parse_number(10, 4);
    if (!low) bad("'{' without a number, write it with a backslash");
    std::string counts = std::to_string(*low);
    int high = *low;
    if (take(",")) {
      const std::optional<int> number = parse_number(10, 4);
      counts += "," + (number ? std::to_string(*number) : std::string());
      high = number.value_or(*low);
    }
    if (!take("}")) bad("'{' is not closed");
    if (high < *low || high > kMaxRepeat) bad("bad repeat counts");
    return "{" + counts + "}";
  }

  std::optional<int> parse_number(int base, size_t max_digits) {
    int value = 0;
    size_t digits = 0;
    for (; digits < max_digits; ++digits, ++at_) {
      const char c = peek();
      const char lower = static_cast<char>(c | 0x20);
      const int digit = c >= '0' && c <= '9'           ? c - '0'
                        : lower >= 'a' && lower <= 'f' ? lower - 'a' + 10
                                                       : base;
      if (digit >= base) break;
      value = value * base + digit;
    }
    return digits == 0 ? std::nullopt : std::optional<int>(value);
  }

  struct Atom {
    CodePointSet set;
    std::optional<char32_t> single;  // may begin or end a range
  };

  static Atom single(char32_t code_point) { return {CodePointSet::of(code_point), code_point}; }
  static Atom many(CodePointSet set, bool negated) {
    return {negated ? set.complement() : std::move(set), {}};
  }

  Atom parse_escape() {
    ++at_;
    const char32_t c = take_code_point();
    switch (c) {
      case 's':
      case 'S':
        return many(CodePointSet::white_space(), c == 'S');
      case 'd':
      case 'D':
        return many(CodePointSet::property("Nd"), c == 'D');
      case 'p':
      case 'P':
        return parse_property(c == 'P');
      case 'x':
      case 'u':
        return single(parse_hex(c));
      case 't':
        return single('\t');
      case 'n':
        return single('\n');
      case 'r':
        return single('\r');
      case 'f':
        return single('\f');
      case 'v':
        return single('\v');
      default:
        if (c < 0x80 && std::isalnum(static_cast<int>(c)) != 0) bad("this escape is not supported");
        return single(c);
    }
  }

  char32_t parse_hex(char32_t letter) {
    std::optional<int> value;
    if (take("{")) {
      value = parse_number(16, 6);
      if (!take("}")) bad("'{' is not closed");
    } else {
      const size_t digits = letter == 'x' ? 2 : 4, start = at_;
      value = parse_number(16, digits);
      if (at_ - start != digits) bad("too few hexadecimal digits");
    }
    if (!value || *value >= static_cast<int>(kEndOfUnicode)) bad("not a code point");
    return static_cast<char32_t>(*value);
  }

  Atom parse_property(bool negated) {
    std::string_view name;
    if (take("{")) {
      if (take("^")) negated = !negated;
      const size_t end = pattern_.find('}', at_);
      if (end == std::string_view::npos) bad("'{' is not closed");
      name = pattern_.substr(at_, end - at_);
      at_ = end + 1;
    } else {
      if (at_end()) bad("ends too early");
      name = pattern_.substr(at_, 1);
      take_code_point();
    }
    try {
      return many(CodePointSet::property(name), negated);
    } catch (const Error& error) {
      bad(error.what());
    }
  }

  // [...]: members united; && intersects what stands on its two sides; ^ negates the whole.
  CodePointSet parse_class(int depth) {
    if (depth == kMaxDepth) bad("too deeply nested");
    ++at_;
    const bool negated = take("^");
    if (peek() == ']') bad("an empty class");
    std::optional<CodePointSet> so_far;
    std::vector<CodePointRange> members;
    const auto intersect_members = [&so_far, &members] {
      const CodePointSet side(std::move(members));
      members.clear();
      so_far = so_far ? so_far->intersect(side) : side;
    };
    while (!take("]")) {
      if (at_end()) bad("a class is not closed");
      if (take("&&")) {
        intersect_members();
        continue;
      }
      const CodePointSet member = parse_member(depth);
      members.insert(members.end(), member.ranges().begin(), member.ranges().end());
    }
    intersect_members();
    const CodePointSet inside = folded(*so_far);  // before the negation: (?i:[^s]) does not match S
    return negated ? inside.complement() : inside;
  }

  CodePointSet parse_member(int depth) {
    if (starts("[:")) bad("POSIX classes are not supported");
    if (starts("--") || starts("~~") || starts("||")) bad("this class operator is not supported");
    if (peek() == '[') return parse_class(depth + 1);
    const Atom first = peek() == '\\' ? parse_escape() : single(take_code_point());
    if (peek() != '-' || peek(1) == ']' || at_ + 1 >= pattern_.size()) return first.set;
    ++at_;
    if (peek() == '[') bad("a class cannot end a range");
    const Atom last = peek() == '\\' ? parse_escape() : single(take_code_point());
    if (!first.single || !last.single || *first.single > *last.single) bad("a bad range in a class");
    return CodePointSet({{*first.single, *last.single}});
  }

  std::string_view pattern_;
  size_t at_ = 0;
  bool fold_ = false;
  bool quantifiable_ = false;
  std::vector<bool> fold_stack_;  // of each open group, the state outside it
  std::vector<PatternPart> parts_;
};

}  // namespace

std::vector<PatternPart> parse_split_pattern(std::string_view pattern) {
  check(pattern.size() <= kMaxPattern, "split pattern: {} bytes, expected at most {}", pattern.size(),
        kMaxPattern);
  check_utf8(pattern, "split pattern");
  return Parser(pattern).parse();
}

}  // namespace kilin::text
