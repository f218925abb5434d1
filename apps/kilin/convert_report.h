// SPDX-License-Identifier: Apache-2.0
// What `kilin convert` and `kilin quantize` share: running a conversion with progress, and its closing lines.
#pragma once
#include <functional>
#include <string>

#include "engine/convert.h"

namespace kilin::cli {

// Runs `work`, which hears of the progress wanted, until it is done or Ctrl-C ends it, and tells on stderr
// what was written. Returns the exit code.
int run_conversion(const std::string& label, const std::string& target, bool progress, ConvertOptions options,
                   const std::function<ConvertReport(const ConvertOptions&)>& work);

}  // namespace kilin::cli
