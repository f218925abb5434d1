// SPDX-License-Identifier: Apache-2.0
// kilin eval perplexity
#include <fmt/format.h>

#include <memory>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "base/cpu.h"
#include "base/error.h"
#include "eval/inputs.h"
#include "eval/perplexity.h"
#include "kilin/common.h"
#include "kilin/eval_tasks.h"
#include "kilin/format.h"
#include "kilin/interrupt.h"
#include "kilin/model_source.h"
#include "kilin/output.h"
#include "kilin/progress.h"

namespace kilin::cli {
namespace {

constexpr const char* kFooter = R"(Exactly one of --file, --jsonl and --ids is needed.

The documents of --file (parted by a form feed) and of --jsonl (one record per
line) are encoded each on its own and joined to a stream [BOS] document [EOS];
the stream is cut into windows that do not overlap and do not see each other;
in each the tokens 2 to WINDOW are predicted; the last partial window is left
out. With --ids every line is a window of its own. Loss is in nats per token.

Examples:
  kilin eval perplexity models/kilin-docs-10m --file text.txt
  kilin eval perplexity models/kilin-docs-10m --file text.txt --window 2048 --max-windows 16
  kilin eval perplexity models/kilin-docs-10m --jsonl text.jsonl --field body --json)";

struct PerplexityOptions {
  ModelArguments model;
  std::optional<std::string> file;
  std::optional<std::string> jsonl;
  std::optional<std::string> ids;
  std::string field = "text";
  int64_t window = 512;
  int64_t max_windows = 0;
  bool json = false;
  bool progress = false;
};

// The token ids that the windows are views of, and the windows.
struct Inputs {
  std::vector<std::vector<int32_t>> sequences;
  std::vector<eval::Window> windows;
};

const std::string& input_path(const PerplexityOptions& options) {
  return options.file ? *options.file : options.jsonl ? *options.jsonl : *options.ids;
}

Inputs whole_sequences(std::vector<std::vector<int32_t>> sequences, int64_t max_windows) {
  Inputs inputs{std::move(sequences), {}};
  for (const auto& sequence : inputs.sequences) {
    if (max_windows > 0 && static_cast<int64_t>(inputs.windows.size()) == max_windows) break;
    inputs.windows.emplace_back(sequence);
  }
  return inputs;
}

Inputs stream_windows(const Model& model, const std::string& content, const PerplexityOptions& options) {
  const std::string& name = input_path(options);
  const auto documents =
      options.file ? eval::split_documents(content, name) : eval::parse_jsonl(content, options.field, name);
  const auto encode = [&](std::string_view text) { return model.encode(text); };
  Inputs inputs;
  inputs.sequences.push_back(eval::token_stream(documents, encode, model.bos_id(), model.eos_id(),
                                                options.max_windows * options.window));
  inputs.windows = eval::cut_windows(inputs.sequences.front(), options.window, options.max_windows);
  check(!inputs.windows.empty(), "{}: found {} tokens, expected at least one window of {} (see --window)",
        name, inputs.sequences.front().size(), options.window);
  return inputs;
}

// The length of the windows where all have the same; else null.
nlohmann::ordered_json common_length(const std::vector<eval::Window>& windows) {
  for (const auto window : windows) {
    if (window.size() != windows.front().size()) return nullptr;
  }
  return windows.front().size();
}

int64_t predicted_tokens(const std::vector<eval::Window>& windows) {
  int64_t tokens = 0;
  for (const auto window : windows) tokens += static_cast<int64_t>(window.size()) - 1;
  return tokens;
}

void print(const eval::Perplexity& result, const Inputs& inputs, bool json, double seconds) {
  if (json) {
    nlohmann::ordered_json object;
    object["perplexity"] = result.perplexity;
    object["loss"] = result.loss;
    object["tokens"] = result.tokens;
    object["windows"] = result.windows;
    object["window"] = common_length(inputs.windows);
    object["seconds"] = seconds;
    write_json_line(object);
    return;
  }
  write_out(fmt::format("perplexity {:.6f}   loss {:.6f}   {} tokens predicted in {} windows\n",
                        result.perplexity, result.loss, with_commas(result.tokens),
                        with_commas(result.windows)));
}

int run_perplexity(const PerplexityOptions& options) {
  const int inputs_given = (options.file ? 1 : 0) + (options.jsonl ? 1 : 0) + (options.ids ? 1 : 0);
  if (inputs_given != 1) throw UsageError("exactly one of --file, --jsonl and --ids is needed");
  const std::string content = read_input(input_path(options));
  const Model model = load_model(options.model, !options.ids.has_value());
  const Inputs inputs =
      options.ids ? whole_sequences(eval::parse_id_lines(content, model.info().vocab_size, *options.ids),
                                    options.max_windows)
                  : stream_windows(model, content, options);
  ModelSource source(model);
  const InterruptScope interrupt;
  Progress progress("perplexity", predicted_tokens(inputs.windows), "tokens",
                    options.progress || progress_by_default());
  const Stopwatch measuring;
  const auto heard = [&](int64_t tokens) {
    progress.update(tokens);
    return !interrupt.interrupted();
  };
  const int threads = options.model.threads;
  const auto result =
      eval::measure_perplexity(source, inputs.windows, heard, threads > 0 ? threads : physical_cores());
  progress.finish();
  const double seconds = measuring.seconds();
  if (interrupt.interrupted()) {
    log_line(fmt::format("interrupted after {} of {} windows", result.windows, inputs.windows.size()));
    if (result.windows == 0) return kInterruptedExit;
  }
  print(result, inputs, options.json, seconds);
  log_line(fmt::format("{} tokens in {} ({} tokens/s)", with_commas(result.tokens), human_duration(seconds),
                       human_rate(static_cast<double>(result.tokens) / seconds)));
  return interrupt.interrupted() ? kInterruptedExit : 0;
}

void add_input_options(const App& app, PerplexityOptions& options) {
  const auto add = [&](const char* name, auto& value, const char* type, const char* text) {
    return app.add_option(name, value, text).type_name(type).group("Input");
  };
  add("--file", options.file, "FILE", "text: documents parted by a form feed; -: standard input");
  add("--jsonl", options.jsonl, "FILE", "a JSON object per line, each record's text a document");
  add("--field", options.field, "NAME", "the key of the text in --jsonl").capture_default_str();
  add("--ids", options.ids, "FILE", "a line of token ids per sequence, each evaluated on its own");
}

}  // namespace

Command add_perplexity(const App& parent) {
  const auto options = std::make_shared<PerplexityOptions>();
  const App app = parent.add_subcommand("perplexity", "perplexity of a text");
  app.footer(kFooter);
  add_model_argument(app, options->model);
  add_input_options(app, *options);
  app.add_option("--window", options->window, "tokens per window")
      .type_name("N")
      .check(in_range(2, 0x1p31, "a whole number from 2"))
      .capture_default_str();
  app.add_option("--max-windows", options->max_windows, "evaluate the first N windows only (default: all)")
      .type_name("N")
      .check(at_least_one());
  app.add_flag("--progress", options->progress, "show progress although standard error is not a terminal");
  app.add_flag("--json", options->json, "print one JSON object");
  add_engine_options(app, options->model);
  return {app, [options] { return run_perplexity(*options); }};
}

}  // namespace kilin::cli
