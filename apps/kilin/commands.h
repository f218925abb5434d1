// SPDX-License-Identifier: Apache-2.0
// The subcommands: each add_x() describes its options to the parser and returns what runs it.
#pragma once
#include <CLI/CLI.hpp>

#include "kilin/help.h"

namespace kilin::cli {

Command add_run(CLI::App& parent);
Command add_chat(CLI::App& parent);
Command add_info(CLI::App& parent);
Command add_eval(CLI::App& parent);
Command add_bench(CLI::App& parent);
Command add_convert(CLI::App& parent);
Command add_quantize(CLI::App& parent);
Command add_merge(CLI::App& parent);
Command add_train(CLI::App& parent);
Command add_tokenize(CLI::App& parent);
Command add_plot(CLI::App& parent);

}  // namespace kilin::cli
