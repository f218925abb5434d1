// SPDX-License-Identifier: Apache-2.0
// How the command line is described: the look of help texts, checks of values, errors of usage.
#pragma once
#include <functional>
#include <stdexcept>
#include <string>
#include <vector>

#include "kilin/arguments.h"

namespace kilin::cli {

// A subcommand and what it does; run returns the exit code.
struct Command {
  App app;
  std::function<int()> run;
};

// Runs the one of these that the command line named.
int run_chosen(const std::vector<Command>& commands);

// Wrong usage that only shows once all options are known (exit code 2).
class UsageError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// Gives the program the look of kilin's help texts; subcommands made afterwards inherit it.
void set_help_style(CLI::App& app);

// For number options: low <= value <= high, said as `expected` when it fails.
Check in_range(double low, double high, const std::string& expected);
Check at_least_one();  // whole numbers from 1
Check seed_number();   // 0 to 2^64 - 1, decimal
Check not_empty();

}  // namespace kilin::cli
