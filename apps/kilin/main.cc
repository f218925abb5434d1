// SPDX-License-Identifier: Apache-2.0
// The program `kilin`. Exit codes: 0 done, 1 bad input or failure (one line on stderr), 2 wrong usage,
// 130 ended by Ctrl-C.
#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <cstdio>
#include <exception>
#include <new>
#include <string>
#include <vector>

#include "base/cpu.h"
#include "kilin/commands.h"
#include "kilin/format.h"
#include "kilin/help.h"
#include "kilin/output.h"

namespace kilin::cli {
namespace {

constexpr const char* kExamples = R"(Examples:
  kilin run models/kilin-docs-10m --prompt "The Linux kernel"
  kilin chat models/kilin-docs-10m
  kilin info models/kilin-docs-10m
  kilin eval perplexity models/kilin-docs-10m --file text.txt
  kilin bench decode models/kilin-docs-10m --depth 4096
  kilin quantize models/kilin-docs-10m docs-q8.gguf --type q8_0
  kilin train --config configs/synthetic/palindrome-tiny.toml

MODEL is a Hugging Face directory (config.json, safetensors, tokenizer) or a
GGUF file of architecture kimi-linear.
'kilin COMMAND --help' tells all options of a command. Results go to standard
output, logs and progress to standard error. Exit codes: 0 done, 1 bad input
or failure, 2 wrong usage, 130 ended by Ctrl-C.)";

int report_failure(const std::string& what) {
  const std::string line = "kilin: error: " + one_line(what) + "\n";
  std::fwrite(line.data(), 1, line.size(), stderr);
  return 1;
}

std::string command_name(const CLI::App* app) {
  return app->get_parent() == nullptr ? app->get_name()
                                      : command_name(app->get_parent()) + " " + app->get_name();
}

const CLI::App* innermost(const CLI::App* app) {
  const auto chosen = app->get_subcommands();
  return chosen.empty() ? app : innermost(chosen.front());
}

int report_usage(const CLI::App& app, const std::string& what) {
  const std::string lines =
      fmt::format("kilin: error: {}\nTry '{} --help'.\n", one_line(what), command_name(innermost(&app)));
  std::fwrite(lines.data(), 1, lines.size(), stderr);
  return 2;
}

int run(int argc, const char* const* argv) {
  CLI::App app("Kilin: a native engine for Kimi Linear language models.", "kilin");
  set_help_style(app);
  app.footer(kExamples);
  app.set_help_flag("-h,--help", "print this help and exit");
  const auto version = [] {
    return fmt::format("kilin {} (cpu: {}, {} cores)", KILIN_VERSION, isa_name(active_isa()),
                       physical_cores());
  };
  app.set_version_flag("--version", version,
                       "print the version, the instruction set and the cores, and exit");
  const App root(app);
  const std::vector<Command> commands{add_run(root),      add_chat(root),  add_info(root),
                                      add_eval(root),     add_bench(root), add_convert(root),
                                      add_quantize(root), add_merge(root), add_train(root),
                                      add_tokenize(root), add_plot(root)};
  app.require_subcommand(1);
  if (argc == 1) {
    write_out(app.help());
    return 2;
  }
  active_isa();  // a bad KILIN_ISA is told by itself, not while a model loads
  const std::string first = argv[1];
  const auto known =
      app.get_subcommands([&](const CLI::App* command) { return command->get_name() == first; });
  if (!first.starts_with('-') && known.empty()) {
    return report_usage(
        app,
        fmt::format(
            "found command '{}', expected run, chat, info, eval, bench, convert, quantize, merge, train, "
            "tokenize or plot",
            first));
  }
  try {
    app.parse(argc, argv);
    return run_chosen(commands);
  } catch (const CLI::CallForHelp&) {
    const CLI::App* asked = innermost(&app);
    const CLI::App* parent = asked->get_parent();
    write_out(asked->help(parent == nullptr ? "" : command_name(parent)));
  } catch (const CLI::CallForVersion& call) {
    write_out(std::string(call.what()) + "\n");
  } catch (const CLI::ParseError& error) {
    return report_usage(app, error.what());
  } catch (const UsageError& error) {
    return report_usage(app, error.what());
  }
  return 0;
}

}  // namespace
}  // namespace kilin::cli

int main(int argc, char** argv) {
  using kilin::cli::report_failure;
  try {
    kilin::cli::ignore_closed_pipes();
    return kilin::cli::run(argc, argv);
  } catch (const std::bad_alloc&) {
    return report_failure("out of memory");
  } catch (const std::exception& error) {
    return report_failure(error.what());
  }
}
