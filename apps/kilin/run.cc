// SPDX-License-Identifier: Apache-2.0
// kilin run: continues a prompt.
#include <fmt/format.h>
#include <unistd.h>

#include <memory>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <vector>

#include "base/error.h"
#include "eval/inputs.h"
#include "kilin/commands.h"
#include "kilin/common.h"
#include "kilin/format.h"
#include "kilin/interrupt.h"
#include "kilin/model_source.h"
#include "kilin/output.h"
#include "kilin/progress.h"

namespace kilin::cli {
namespace {

constexpr const char* kFooter =
    R"(Exactly one of --prompt, --prompt-file and --prompt-ids is needed. The beginning
token goes in front of a text that does not itself begin with a special token
such as [BOS] or <|im_user|>; --no-bos leaves it out.

The text is printed as it comes. With --json nothing is streamed and the last
line of output is one object: ids, text, prompt_tokens, finish_reason, timings.
Ctrl-C ends the text cleanly (exit code 130); a second one kills the program.

Examples:
  kilin run models/kilin-docs-10m --prompt "The Linux kernel" -n 64
  kilin run models/kilin-docs-10m --prompt "DESCRIPTION" --temperature 0.8 --seed 7
  kilin run models/kilin-docs-10m --prompt-file - --stop $'\n\n' < prompt.txt
  kilin run models/kilin-docs-10m --prompt-ids 7936,461,2573 --json)";

struct RunOptions {
  ModelArguments model;
  std::optional<std::string> prompt;
  std::optional<std::string> prompt_file;
  std::optional<std::string> prompt_ids;
  bool bos = false;
  bool no_bos = false;
  GenerateOptions generate;
  bool json = false;
  bool progress = false;
};

void add_prompt_options(const App& app, RunOptions& options) {
  const auto add = [&](const char* name, auto& value, const char* type, const char* text) {
    app.add_option(name, value, text).type_name(type).group("Prompt");
  };
  add("--prompt", options.prompt, "TEXT", "the text to continue; special tokens in it are recognised");
  add("--prompt-file", options.prompt_file, "FILE",
      "take the text from a file, byte for byte; -: standard input");
  add("--prompt-ids", options.prompt_ids, "IDS", "token ids, as in 1,2,3; fed as they are");
  const Option bos = app.add_flag("--bos", options.bos,
                                  "put the beginning token in front of the text (default: unless the text "
                                  "begins with a special token)")
                         .group("Prompt");
  app.add_flag("--no-bos", options.no_bos, "do not put it there").group("Prompt").excludes(bos);
}

void add_generate_options(const App& app, RunOptions& options) {
  app.add_option("-n,--max-tokens", options.generate.max_tokens, "tokens to generate at most")
      .type_name("N")
      .check(at_least_one())
      .capture_default_str();
  app.add_option("--stop", options.generate.stop, "end before this text; may be given several times")
      .type_name("TEXT")
      .check(not_empty())
      .one_value_each();
  app.add_flag("--ignore-eos", options.generate.ignore_end_tokens, "go on after end-of-text tokens");
  app.add_flag("--progress", options.progress,
               "show progress of a long prompt although standard error is not a terminal");
  app.add_flag("--json", options.json, "print one JSON object instead of the text");
}

void check_usage(const RunOptions& options) {
  const int prompts = (options.prompt ? 1 : 0) + (options.prompt_file ? 1 : 0) + (options.prompt_ids ? 1 : 0);
  if (prompts != 1) throw UsageError("exactly one of --prompt, --prompt-file and --prompt-ids is needed");
  if (options.prompt_ids && (options.bos || options.no_bos))
    throw UsageError("--prompt-ids is fed as it is: no --bos or --no-bos");
}

std::vector<int32_t> encode_text(const Model& model, const std::string& text, const RunOptions& options) {
  const std::string name = options.prompt ? "--prompt" : *options.prompt_file;
  check_text(text, name);
  std::vector<int32_t> ids = model.encode(text);
  const bool has_bos = model.bos_id() >= 0;
  check(has_bos || !options.bos, "--bos: {} names no beginning token", options.model.path);
  const bool add = options.bos || (!options.no_bos && !begins_with_special(model, ids));
  if (has_bos && add) ids.insert(ids.begin(), model.bos_id());
  check(!ids.empty(), "{}: found no text, expected at least one token", name);
  return ids;
}

std::vector<int32_t> prompt_tokens(const Model& model, const std::string& text, const RunOptions& options) {
  if (!options.prompt_ids) return encode_text(model, text, options);
  auto ids = eval::parse_token_ids(text, model.info().vocab_size, "--prompt-ids");
  check(!ids.empty(), "--prompt-ids: found no ids, expected at least one");
  return ids;
}

double rate(double count, double seconds) { return seconds > 0 && count > 0 ? count / seconds : 0; }

// The first token comes out of the prefill, so n tokens take n - 1 steps.
double decode_rate(const GenerateResult& result) {
  return rate(static_cast<double>(result.ids.size()) - 1, result.decode_seconds);
}

double prefill_rate(const GenerateResult& result) {
  return rate(static_cast<double>(result.prefilled_tokens), result.prefill_seconds);
}

nlohmann::ordered_json to_json(const GenerateResult& result, double load_seconds) {
  nlohmann::ordered_json json;
  json["ids"] = result.ids;
  json["text"] = result.text;
  json["prompt_tokens"] = result.prompt_tokens;
  json["finish_reason"] = result.finish_reason;
  json["timings"] = {{"load_seconds", load_seconds},
                     {"prefill_seconds", result.prefill_seconds},
                     {"prefill_tokens_per_second", prefill_rate(result)},
                     {"decode_seconds", result.decode_seconds},
                     {"decode_tokens_per_second", decode_rate(result)}};
  return json;
}

std::string summary(const GenerateResult& result, double load_seconds) {
  return fmt::format(
      "prompt {} tokens ({} tokens/s), generated {} tokens ({} tokens/s), end: {}, loaded in {}",
      with_commas(result.prompt_tokens), human_rate(prefill_rate(result)),
      with_commas(static_cast<int64_t>(result.ids.size())), human_rate(decode_rate(result)),
      result.finish_reason, human_duration(load_seconds));
}

// Generates and streams; the result says "cancelled" after Ctrl-C and when the reader of stdout went away.
GenerateResult generate(const Model& model, const std::vector<int32_t>& prompt, const RunOptions& options,
                        const InterruptScope& interrupt) {
  Progress progress("prompt", static_cast<int64_t>(prompt.size()), "tokens",
                    options.progress || progress_by_default());
  GenerateOptions generate = options.generate;
  generate.on_prefill = [&](int64_t done) {
    progress.update(done);
    return !interrupt.interrupted();
  };
  generate.on_text = [&](std::string_view text) {
    progress.finish();
    return options.json || write_out(text);
  };
  generate.on_token = [&](int32_t) { return !interrupt.interrupted(); };
  Sequence sequence = model.new_sequence();
  return model.generate(sequence, prompt, generate);
}

void print(const Model& model, const GenerateResult& result, const RunOptions& options, double load_seconds) {
  if (options.json) {
    write_json_line(to_json(result, load_seconds));
  } else if (!model.has_tokenizer()) {
    write_out(fmt::format("{}\n", fmt::join(result.ids, ",")));
  } else if (result.text.empty() || result.text.back() != '\n') {
    write_out("\n");
  }
}

int run(const RunOptions& options) {
  check_usage(options);
  for (const std::string& stop : options.generate.stop) check_text(stop, "--stop");
  // Read before the model is loaded, so that a wrong file name costs no time.
  const std::string text = options.prompt        ? *options.prompt
                           : options.prompt_file ? read_input(*options.prompt_file)
                                                 : *options.prompt_ids;
  const Stopwatch loading;
  const Model model = load_model(options.model, !options.prompt_ids || !options.generate.stop.empty());
  const double load_seconds = loading.seconds();
  const auto prompt = prompt_tokens(model, text, options);
  const InterruptScope interrupt;
  const GenerateResult result = generate(model, prompt, options, interrupt);
  print(model, result, options, load_seconds);
  log_line(summary(result, load_seconds));
  return interrupt.interrupted() ? kInterruptedExit : 0;
}

}  // namespace

Command add_run(const App& parent) {
  const auto options = std::make_shared<RunOptions>();
  const App app = parent.add_subcommand("run", "continue a prompt");
  app.footer(kFooter);
  add_model_argument(app, options->model);
  add_prompt_options(app, *options);
  add_generate_options(app, *options);
  add_sampling_options(app, options->generate.sampling);
  add_engine_options(app, options->model);
  return {app, [options] { return run(*options); }};
}

}  // namespace kilin::cli
