// SPDX-License-Identifier: Apache-2.0
// Reads a split regex in the syntax that Rust's regex and Oniguruma share, and reduces every character and
// class in it to a set of code points. What the two engines read differently, or PCRE2 would, is an Error.
#pragma once
#include <string>
#include <string_view>
#include <variant>
#include <vector>

#include "text/code_point_set.h"

namespace kilin::text {

// A pattern as operators (groups, alternation, quantifiers: the same text in PCRE2) and sets of characters.
using PatternPart = std::variant<std::string, CodePointSet>;

std::vector<PatternPart> parse_split_pattern(std::string_view pattern);

}  // namespace kilin::text
