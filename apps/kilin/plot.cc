// SPDX-License-Identifier: Apache-2.0
// kilin plot: curves of training logs as a picture.
#include "train/plot.h"

#include <fmt/format.h>

#include <memory>
#include <string>
#include <vector>

#include "base/error.h"
#include "kilin/commands.h"
#include "kilin/output.h"

namespace kilin::cli {
namespace {

constexpr const char* kFooter =
    R"(LOG is a log.jsonl or log.csv, or the directory of a run. Keys: step, tokens, seconds; loss,
accuracy, lr, grad_norm, tokens_per_second, share_of_peak, valid_loss,
valid_perplexity, valid_accuracy, valid_exact. Drawn by gnuplot.

Examples:
  kilin plot runs/a runs/b --out loss.svg
  kilin plot runs/* --y valid_accuracy --out accuracy.png --title "Palindrome, length 256")";

struct Options {
  std::vector<std::string> logs, labels;
  std::string out;
  train::PlotOptions plot;
};

int run(const Options& options) {
  if (!options.labels.empty() && options.labels.size() != options.logs.size()) {
    throw UsageError(fmt::format("--label: found {}, expected one for each of the {} logs",
                                 options.labels.size(), options.logs.size()));
  }
  std::vector<train::Curve> curves;
  for (size_t i = 0; i < options.logs.size(); ++i) {
    curves.push_back(train::read_curve(options.logs[i], options.plot));
    if (!options.labels.empty()) curves.back().label = options.labels[i];
  }
  train::draw_plot(curves, options.plot, options.out);
  log_line(fmt::format("{}: {} curves", options.out, curves.size()));
  return 0;
}

}  // namespace

Command add_plot(const App& parent) {
  const auto options = std::make_shared<Options>();
  const App app = parent.add_subcommand("plot", "curves of training logs as a picture");
  app.footer(kFooter);
  app.add_option("LOG", options->logs, "logs or directories of runs, a curve each").required();
  app.add_option("--out", options->out, "picture to write: .svg or .png").type_name("FILE").required();
  app.add_option("--x", options->plot.x, "key of the horizontal axis").type_name("KEY").capture_default_str();
  app.add_option("--y", options->plot.y, "key of the vertical axis").type_name("KEY").capture_default_str();
  app.add_option("--title", options->plot.title, "text above the plot").type_name("TEXT");
  app.add_option("--label", options->labels, "names of the curves (default: of their directories)")
      .type_name("TEXT...");
  app.add_flag("--log", options->plot.log_y, "logarithmic vertical axis");
  return {app, [options] { return run(*options); }};
}

}  // namespace kilin::cli
