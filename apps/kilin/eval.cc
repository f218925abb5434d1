// SPDX-License-Identifier: Apache-2.0
// kilin eval: measures how well a model does. What the tasks share.
#include <fmt/format.h>

#include <algorithm>
#include <vector>

#include "kilin/commands.h"
#include "kilin/eval_tasks.h"
#include "kilin/format.h"
#include "kilin/output.h"

namespace kilin::cli {
namespace {

constexpr const char* kTasks =
    R"(perplexity      exp of the mean negative log likelihood of a text
classification  labels by log likelihood: accuracy, F1
choice          multiple choice by log likelihood: accuracy, also per byte
extraction      generated answers: exact match, F1 of words
palindrome      synthetic: the tokens before <sep> in reverse
mqar            synthetic: values of keys seen before (multi-query associative recall)
stack           synthetic: what comes off one of several stacks
)";

constexpr const char* kFooter = R"(Examples:
  kilin eval list
  kilin eval perplexity models/kilin-docs-10m --file text.txt
  kilin eval classification models/kilin-docs-10m --jsonl labels.jsonl --chat
  kilin eval mqar CHECKPOINT --length 1024 --kv-pairs 128)";

}  // namespace

void add_report_options(const App& app, ReportOptions& options) {
  app.add_flag("--progress", options.progress, "show progress although standard error is not a terminal");
  app.add_flag("--json", options.json, "print one JSON object");
}

int run_task(const std::string& label, const std::string& unit, int64_t total, const ReportOptions& options,
             const std::function<TaskReport(const std::function<bool(int64_t)>&)>& work) {
  const InterruptScope interrupt;
  Progress progress(label, total, unit, options.progress || progress_by_default());
  const Stopwatch measuring;
  TaskReport report = work([&](int64_t done) {
    progress.update(done);
    return !interrupt.interrupted();
  });
  progress.finish();
  const double seconds = measuring.seconds();
  if (interrupt.interrupted()) {
    log_line(fmt::format("interrupted after {} of {} {}", report.done, total, unit));
    if (report.done == 0) return kInterruptedExit;
  }
  if (options.json) {
    report.json["seconds"] = seconds;
    write_json_line(report.json);
  } else {
    write_out(report.text);
  }
  log_line(fmt::format("{} {} in {}", with_commas(report.done), unit, human_duration(seconds)));
  return interrupt.interrupted() ? kInterruptedExit : 0;
}

std::string percent_with_error(const eval::Mean& mean) {
  return fmt::format("{:.2f} % (standard error {:.2f} %)", 100 * mean.value, 100 * mean.standard_error);
}

Command add_eval(const App& parent) {
  const App app = parent.add_subcommand("eval", "measure how well a model does");
  app.footer(kFooter);
  app.require_subcommand(1);
  const Command list{app.add_subcommand("list", "list the tasks"), [] {
                       write_out(kTasks);
                       return 0;
                     }};
  const std::vector<Command> tasks{add_perplexity(app),
                                   add_classification(app),
                                   add_choice(app),
                                   add_extraction(app),
                                   add_synthetic(app, "palindrome"),
                                   add_synthetic(app, "mqar"),
                                   add_synthetic(app, "stack"),
                                   list};
  return {app, [tasks] { return run_chosen(tasks); }};
}

}  // namespace kilin::cli
