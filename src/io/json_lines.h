// SPDX-License-Identifier: Apache-2.0
// JSONL: a JSON object per line.
#pragma once
#include <functional>
#include <string>
#include <string_view>

#include "io/json.h"

namespace kilin::io {

// Calls use(reader, line) for the object of every line, lines counted from 1; empty ones are skipped. Errors,
// the reader's own too, begin with "NAME:LINE: ". Throws Error for a line that is no object and for a text
// without any.
void for_each_json_line(std::string_view text, const std::string& name,
                        const std::function<void(const JsonReader&, int64_t line)>& use);

}  // namespace kilin::io
