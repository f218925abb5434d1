// SPDX-License-Identifier: Apache-2.0
#include "text/code_point_set.h"

#include <algorithm>
#include <array>

#include "base/error.h"

namespace kilin::text {
namespace {

enum Category : uint8_t {
  kLu,
  kLl,
  kLt,
  kLm,
  kLo,
  kMn,
  kMc,
  kMe,
  kNd,
  kNl,
  kNo,
  kPc,
  kPd,
  kPs,
  kPe,  // clang-format off
  kPi, kPf, kPo, kSm, kSc, kSk, kSo, kZs, kZl, kZp, kCc, kCf, kCs, kCo, kCn,
};  // clang-format on

constexpr std::array<std::string_view, 30> kCategoryNames = {
    "Lu", "Ll", "Lt", "Lm", "Lo", "Mn", "Mc", "Me", "Nd", "Nl", "No", "Pc", "Pd", "Ps", "Pe",
    "Pi", "Pf", "Po", "Sm", "Sc", "Sk", "So", "Zs", "Zl", "Zp", "Cc", "Cf", "Cs", "Co", "Cn"};

struct CategoryRun {
  uint32_t count;
  Category category;
};

#include "text/unicode_tables.inc"

constexpr char32_t kLongS = 0x17F, kKelvin = 0x212A;  // the two that fold to ASCII letters, s and k

bool category_has_name(Category category, std::string_view name) {
  const std::string_view own = kCategoryNames[category];
  if (name == "LC" || name == "L&") return category == kLu || category == kLl || category == kLt;
  return name == own || (name.size() == 1 && name[0] == own[0]);
}

}  // namespace

CodePointSet::CodePointSet(std::vector<CodePointRange> ranges) {
  std::sort(ranges.begin(), ranges.end(), [](auto a, auto b) { return a.first < b.first; });
  for (const CodePointRange& range : ranges) {
    if (!ranges_.empty() && range.first <= ranges_.back().last + 1) {
      ranges_.back().last = std::max(ranges_.back().last, range.last);
    } else {
      ranges_.push_back(range);
    }
  }
}

CodePointSet CodePointSet::white_space() {
  return CodePointSet({std::begin(kWhiteSpace), std::end(kWhiteSpace)});
}

CodePointSet CodePointSet::property(std::string_view name) {
  if (name == "Han" || name == "Script=Han" || name == "sc=Han") {
    return CodePointSet({std::begin(kHan), std::end(kHan)});
  }
  if (name == "White_Space" || name == "wspace") return white_space();
  if (name == "Any") return CodePointSet({{0, kEndOfUnicode - 1}});
  std::vector<CodePointRange> ranges;
  char32_t first = 0;
  for (const CategoryRun& run : kCategoryRuns) {
    if (category_has_name(run.category, name)) ranges.push_back({first, first + run.count - 1});
    first += run.count;
  }
  check(!ranges.empty(), "unknown property '{}', expected a general category, Han or White_Space", name);
  return CodePointSet(std::move(ranges));
}

bool CodePointSet::contains(char32_t code_point) const {
  const auto after =
      std::upper_bound(ranges_.begin(), ranges_.end(), code_point,
                       [](char32_t value, const CodePointRange& r) { return value < r.first; });
  return after != ranges_.begin() && code_point <= std::prev(after)->last;
}

CodePointSet CodePointSet::complement() const {
  std::vector<CodePointRange> gaps;
  char32_t next = 0;
  for (const CodePointRange& range : ranges_) {
    if (range.first > next) gaps.push_back({next, range.first - 1});
    next = range.last + 1;
  }
  if (next < kEndOfUnicode) gaps.push_back({next, kEndOfUnicode - 1});
  return CodePointSet(std::move(gaps));
}

CodePointSet CodePointSet::unite(const CodePointSet& other) const {
  std::vector<CodePointRange> both = ranges_;
  both.insert(both.end(), other.ranges_.begin(), other.ranges_.end());
  return CodePointSet(std::move(both));
}

CodePointSet CodePointSet::intersect(const CodePointSet& other) const {
  return complement().unite(other.complement()).complement();
}

CodePointSet CodePointSet::fold_case() const {
  std::vector<CodePointRange> more = ranges_;
  for (const CodePointRange& range : ranges_) {
    const bool known =
        range.last < 0x80 || (range.first == range.last && (range.first == kLongS || range.first == kKelvin));
    check(known, "case-insensitive match of U+{:04X} is not supported, only of ASCII",
          static_cast<uint32_t>(range.last));
  }
  for (char32_t lower = 'a'; lower <= 'z'; ++lower) {
    std::vector<CodePointRange> forms = {{lower, lower}, {lower - 32, lower - 32}};
    if (lower == 's') forms.push_back({kLongS, kLongS});
    if (lower == 'k') forms.push_back({kKelvin, kKelvin});
    const auto inside = [this](const CodePointRange& form) { return contains(form.first); };
    if (std::any_of(forms.begin(), forms.end(), inside)) more.insert(more.end(), forms.begin(), forms.end());
  }
  return CodePointSet(std::move(more));
}

}  // namespace kilin::text
