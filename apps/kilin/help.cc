// SPDX-License-Identifier: Apache-2.0
#include "kilin/help.h"

#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <charconv>
#include <cstdint>
#include <memory>
#include <sstream>
#include <utility>

namespace kilin::cli {
namespace {

constexpr size_t kNameColumn = 32;
constexpr size_t kTextWidth = 68;

// Descriptions stand in a column of their own, wrapped between words; '\n' starts a new line.
class Help : public CLI::Formatter {
 public:
  std::string make_option(const CLI::Option* option, bool positional) const override {
    std::string names = make_option_name(option, positional);
    // Options without a short form line up behind those that have one: "-n, --max-tokens".
    if (!positional && names.rfind("--", 0) == 0) names = "    " + names;
    const size_t comma = names.find(",--");
    if (comma != std::string::npos) names.insert(comma + 1, " ");
    const std::string type = option->get_type_name();
    if (!positional && option->get_type_size() != 0 && !type.empty()) names += " " + type;
    std::string text = option->get_description();
    if (!option->get_default_str().empty()) text += " (default: " + option->get_default_str() + ")";
    return entry(names, text);
  }

  std::string make_help(const CLI::App* app, std::string name, CLI::AppFormatMode) const override {
    return make_description(app) + make_usage(app, std::move(name)) + make_positionals(app) +
           make_option_groups(app) + make_subcommands(app, CLI::AppFormatMode::Normal) + "\n" +
           make_footer(app);
  }

  // General options come last.
  std::string make_option_groups(const CLI::App* app) const {
    std::vector<std::string> groups = app->get_groups();
    std::stable_partition(groups.begin(), groups.end(), [](const std::string& g) { return g != "Options"; });
    std::string out;
    for (const std::string& group : groups) {
      const auto options = app->get_options(
          [&](const CLI::Option* option) { return option->get_group() == group && option->nonpositional(); });
      if (!group.empty() && !options.empty()) out += make_group(group, false, options);
    }
    return out;
  }

  std::string make_subcommands(const CLI::App* app, CLI::AppFormatMode) const override {
    std::string out;
    for (const CLI::App* sub : app->get_subcommands({})) out += make_subcommand(sub);
    return out.empty() ? out : "\nCommands:\n" + out;
  }

  std::string make_subcommand(const CLI::App* sub) const override {
    return entry(sub->get_name(), sub->get_description());
  }

  std::string make_usage(const CLI::App* app, std::string name) const override {
    std::string usage = "\nUsage: " + name;
    for (const CLI::Option* option : app->get_options()) {
      if (option->get_positional()) usage += " " + make_option_usage(option);
    }
    const auto named = [](const CLI::App* sub) { return !sub->get_name().empty(); };
    return usage + (app->get_subcommands(named).empty() ? " [OPTIONS]\n" : " COMMAND ...\n");
  }

 private:
  static std::string entry(const std::string& name, const std::string& text) {
    std::string out = "  " + name;
    size_t column = out.size();
    std::istringstream lines(text);
    std::string line;
    if (column + 2 > kNameColumn) {
      out += '\n';
      column = 0;
    }
    while (std::getline(lines, line)) {
      out += std::string(kNameColumn - column, ' ') + wrapped(line);
      column = 0;
    }
    return text.empty() ? out + "\n" : out;
  }

  static std::string wrapped(const std::string& line) {
    std::string out;
    size_t used = 0;
    std::istringstream words(line);
    std::string word;
    while (words >> word) {
      const bool full = used > 0 && used + 1 + word.size() > kTextWidth;
      if (full) out += '\n' + std::string(kNameColumn, ' ');
      if (!full && used > 0) out += ' ';
      used = full ? word.size() : used + (used > 0 ? 1 : 0) + word.size();
      out += word;
    }
    return out + '\n';
  }
};

}  // namespace

int run_chosen(const std::vector<Command>& commands) {
  for (const Command& command : commands) {
    if (command.app.parsed()) return command.run();
  }
  throw UsageError("a command is required");
}

void set_help_style(CLI::App& app) {
  const auto help = std::make_shared<Help>();
  help->label("Positionals", "Arguments");
  app.formatter(help);
}

namespace {
// CLI11 would read 010 as 8.
bool looks_octal(const std::string& text) {
  return text.size() > 1 && text[0] == '0' && text[1] >= '0' && text[1] <= '9';
}
}  // namespace

Check in_range(double low, double high, const std::string& expected) {
  return [low, high, expected](const std::string& text) -> std::string {
    double value = 0;
    const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
    const bool number = error == std::errc{} && end == text.data() + text.size() && !looks_octal(text);
    if (number && value >= low && value <= high) return {};
    return fmt::format("found '{}', expected {}", text, expected);
  };
}

Check at_least_one() { return in_range(1, 0x1p53, "a whole number from 1"); }

Check seed_number() {
  return [](const std::string& text) -> std::string {
    uint64_t value = 0;
    const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
    if (error == std::errc{} && end == text.data() + text.size() && !looks_octal(text)) return {};
    return fmt::format("found '{}', expected a whole number from 0 to 18446744073709551615", text);
  };
}

Check not_empty() {
  return [](const std::string& text) -> std::string {
    return text.empty() ? "found an empty text, expected at least one character" : "";
  };
}

}  // namespace kilin::cli
