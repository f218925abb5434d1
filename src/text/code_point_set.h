// SPDX-License-Identifier: Apache-2.0
// Sets of code points as sorted ranges, with Unicode 16.0's categories and the properties that patterns use.
#pragma once
#include <string_view>
#include <vector>

#include "text/utf8.h"

namespace kilin::text {

struct CodePointRange {
  char32_t first, last;  // both inside
  bool operator==(const CodePointRange&) const = default;
};

class CodePointSet {
 public:
  CodePointSet() = default;
  explicit CodePointSet(std::vector<CodePointRange> ranges);  // any order, may overlap

  static CodePointSet of(char32_t code_point) { return CodePointSet({{code_point, code_point}}); }
  static CodePointSet white_space();
  // A general category ("L", "Lu", "LC") or a script ("Han", "Script=Han", "sc=Han"), "White_Space", "Any".
  // Error for any other name.
  static CodePointSet property(std::string_view name);

  const std::vector<CodePointRange>& ranges() const { return ranges_; }
  bool contains(char32_t code_point) const;
  bool empty() const { return ranges_.empty(); }
  bool operator==(const CodePointSet&) const = default;

  CodePointSet complement() const;
  CodePointSet unite(const CodePointSet& other) const;
  CodePointSet intersect(const CodePointSet& other) const;
  // All that a case-insensitive pattern matches for these: "s" is also U+017F. Error for sets beyond ASCII,
  // which no known split pattern folds.
  CodePointSet fold_case() const;

 private:
  std::vector<CodePointRange> ranges_;  // sorted, apart from each other
};

}  // namespace kilin::text
