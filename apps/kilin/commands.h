// SPDX-License-Identifier: Apache-2.0
// The subcommands: each add_x() describes its options to the parser and returns what runs it.
#pragma once

#include "kilin/help.h"

namespace kilin::cli {

Command add_run(const App& parent);
Command add_chat(const App& parent);
Command add_info(const App& parent);
Command add_eval(const App& parent);
Command add_bench(const App& parent);
Command add_convert(const App& parent);
Command add_quantize(const App& parent);
Command add_merge(const App& parent);
Command add_train(const App& parent);
Command add_tokenize(const App& parent);
Command add_plot(const App& parent);

}  // namespace kilin::cli
