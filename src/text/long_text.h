// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <string_view>
#include <vector>

namespace kilin::text {

// Kimi's TikTokenTokenizer encodes long text in parts: of 400,000 characters, and within those of 25,000
// characters in a row that are all white space or all not. It was meant to spare tiktoken, but it moves piece
// boundaries, so the ids of such text depend on it. Text of fewer characters is one part. White space is
// Python's str.isspace().
std::vector<std::string_view> cut_long_text(std::string_view text);

}  // namespace kilin::text
