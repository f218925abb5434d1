// SPDX-License-Identifier: Apache-2.0
// Curves of training logs as a picture, drawn by gnuplot.
#pragma once
#include <string>
#include <vector>

namespace kilin::train {

struct Curve {
  std::string label;
  std::vector<double> x, y;  // of equal length
};

struct PlotOptions {
  std::string x = "step";  // keys of log.jsonl
  std::string y = "loss";
  std::string title;
  bool log_y = false;
  int width = 900, height = 560;  // pixels
};

// The records of a log.jsonl or log.csv (or of the one in a directory, the first if there are both) that have
// both keys. Throws Error naming the line for what is no record, and when none has them. A last line without
// its end, which a killed process may leave, is passed over.
Curve read_curve(const std::string& path, const PlotOptions& options);

// What gnuplot is told; `terminal` is "svg" or "png".
std::string plot_script(const std::vector<Curve>& curves, const PlotOptions& options,
                        const std::string& terminal);

// Draws to PATH, whose ending says the format: .svg or .png. Throws Error when gnuplot is missing or fails.
void draw_plot(const std::vector<Curve>& curves, const PlotOptions& options, const std::string& path);

}  // namespace kilin::train
