// SPDX-License-Identifier: Apache-2.0
// kilin eval palindrome, mqar and stack
#include <fmt/format.h>

#include <memory>
#include <string>

#include "base/error.h"
#include "eval/tasks.h"
#include "kilin/eval_tasks.h"
#include "kilin/format.h"
#include "kilin/model_source.h"

namespace kilin::cli {
namespace {

constexpr const char* kFooter =
    R"(Examples are made from the seed; no example of the held-out split is ever in the
training split. The settings must be those of the training. A label counts as
right when it is the most likely token of the whole vocabulary. What the tokens
are: src/eval/synthetic.h.)";

struct Options {
  ModelArguments model;
  eval::SyntheticConfig task;
  int64_t vocabulary = 0;  // 0: the model's
  int64_t examples = 256;
  uint64_t first = 0;
  bool training_split = false;
  ReportOptions report;
};

nlohmann::ordered_json to_json(const eval::SyntheticScore& score, const eval::SyntheticConfig& task) {
  nlohmann::ordered_json json;
  json["task"] = eval::synthetic_name(task.kind);
  json["length"] = task.length;
  json["vocabulary"] = task.vocabulary;
  if (task.kind == eval::SyntheticKind::kMqar) json["kv_pairs"] = task.kv_pairs;
  if (task.kind == eval::SyntheticKind::kStack) json["stacks"] = task.stacks;
  json["seed"] = task.seed;
  json["examples"] = score.examples;
  json["labels"] = score.labels;
  json["accuracy"] = score.accuracy.value;
  json["accuracy_stderr"] = score.accuracy.standard_error;
  json["exact"] = score.exact.value;
  json["exact_stderr"] = score.exact.standard_error;
  json["loss"] = score.loss;
  return json;
}

std::string to_text(const eval::SyntheticScore& score) {
  return fmt::format("accuracy {}   examples all right {}   loss {:.6f}   {} labels in {} examples\n",
                     percent_with_error(score.accuracy), percent_with_error(score.exact), score.loss,
                     with_commas(score.labels), with_commas(score.examples));
}

int run(const Options& options) {
  eval::SyntheticConfig config = options.task;
  config.vocabulary = options.vocabulary;
  if (config.vocabulary > 0) (void)eval::SyntheticTask(config);  // before the model is loaded
  const Model model = load_model(options.model, false);
  if (config.vocabulary == 0) config.vocabulary = model.info().vocab_size;
  const eval::SyntheticTask task(config);
  check(task.config().length <= model.info().max_length,
        "length: found {}, expected at most the {} tokens that {} takes (model_max_length in config.json)",
        task.config().length, model.info().max_length, options.model.path);
  ModelSource source(model);
  const std::string name(eval::synthetic_name(config.kind));
  return run_task(name, "examples", options.examples, options.report, [&](const auto& progress) {
    const auto split = options.training_split ? eval::Split::kTrain : eval::Split::kHeldOut;
    const auto score = eval::score_synthetic(source, task, split, options.first, options.examples, progress);
    return TaskReport{score.examples, to_json(score, task.config()), to_text(score)};
  });
}

void add_task_options(const App& app, Options& options) {
  const auto add = [&](const char* name, auto& value, const char* text) {
    return app.add_option(name, value, text).type_name("N").group("Task");
  };
  add("--length", options.task.length, "tokens of an example").check(at_least_one()).capture_default_str();
  add("--vocabulary", options.vocabulary, "tokens are below N (default: the model's vocabulary)")
      .check(at_least_one());
  if (options.task.kind == eval::SyntheticKind::kMqar) {
    add("--kv-pairs", options.task.kv_pairs, "keys with a value, each asked for once (default: length / 8)")
        .check(at_least_one());
    add("--power", options.task.power, "a of the power law of the queries' places")
        .check(in_range(1e-9, 1, "a number above 0, up to 1"))
        .capture_default_str();
    app.add_flag("!--zero-filler", options.task.random_filler,
                 "token 0 where no query is, instead of any token")
        .group("Task");
  }
  if (options.task.kind == eval::SyntheticKind::kStack) {
    add("--stacks", options.task.stacks, "number of stacks").check(at_least_one()).capture_default_str();
  }
  add("--seed", options.task.seed, "of the examples").check(seed_number()).capture_default_str();
  add("--examples", options.examples, "how many").check(at_least_one()).capture_default_str();
  add("--first", options.first, "number of the first one")
      .check(in_range(0, 0x1p53, "a whole number from 0"));
  app.add_flag("--training-split", options.training_split, "examples that a training may have seen")
      .group("Task");
}

}  // namespace

Command add_synthetic(const App& parent, std::string_view task) {
  const auto options = std::make_shared<Options>();
  options->task.kind = eval::synthetic_kind(task, "task");
  const App app =
      parent.add_subcommand(std::string(task), fmt::format("accuracy on the synthetic task {}", task));
  app.footer(kFooter);
  add_model_argument(app, options->model);
  add_task_options(app, *options);
  add_report_options(app, options->report);
  add_engine_options(app, options->model);
  return {app, [options] { return run(*options); }};
}

}  // namespace kilin::cli
