// SPDX-License-Identifier: Apache-2.0
// The tasks of `kilin eval`, each a subcommand, and what they share.
#pragma once
#include <functional>
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>

#include "eval/scores.h"
#include "kilin/common.h"
#include "kilin/help.h"
#include "kilin/interrupt.h"
#include "kilin/progress.h"

namespace kilin::cli {

Command add_perplexity(const App& parent);
Command add_classification(const App& parent);
Command add_choice(const App& parent);
Command add_extraction(const App& parent);
Command add_synthetic(const App& parent, std::string_view task);  // palindrome, mqar or stack

// --progress and --json
struct ReportOptions {
  bool json = false;
  bool progress = false;
};
void add_report_options(const App& app, ReportOptions& options);

// Runs `work`, which hears a callback for its progress and returns how much it did, under a progress line and
// Ctrl-C. Then prints `report` as JSON with the seconds it took, or `text`. Returns the exit code.
struct TaskReport {  // NOLINT(bugprone-exception-escape): ordered_json declares its move so
  int64_t done = 0;
  nlohmann::ordered_json json;
  std::string text;
};
int run_task(const std::string& label, const std::string& unit, int64_t total, const ReportOptions& options,
             const std::function<TaskReport(const std::function<bool(int64_t)>&)>& work);

// "93.75 % (standard error 1.21 %)"
std::string percent_with_error(const eval::Mean& mean);

}  // namespace kilin::cli
