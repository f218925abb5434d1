// SPDX-License-Identifier: Apache-2.0
// kilin train: trains what a TOML file describes.
#include <fmt/format.h>

#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "kilin/commands.h"
#include "kilin/format.h"
#include "kilin/output.h"
#include "kilin/train_run.h"
#include "train/cost.h"
#include "train/sources.h"

namespace kilin::cli {
namespace {

constexpr const char* kFooter =
    R"(The keys of the file are described in docs/guides/training.md. Paths in it are
relative to the current directory (those of 'include' to the file). Several
processes share the work when RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and
MASTER_PORT are set, as torchrun sets them. Ctrl-C saves a checkpoint and stops.

Examples:
  kilin train --config configs/synthetic/palindrome-kda.toml
  kilin train --config configs/docs-10m.toml --set optimizer.lr=5e-4 --out runs/lower
  kilin train --config configs/docs-10m.toml --resume)";

struct Options {
  std::string config, out;
  std::vector<std::string> overrides;
  bool dry_run = false;
  TrainOptions run;
};

std::string megabytes(double bytes) { return fmt::format("{:.1f} MB", bytes / 1e6); }

nlohmann::ordered_json plan_json(const train::TrainConfig& config, const train::TrainingCost& cost) {
  nlohmann::ordered_json object;
  object["parameters"] = cost.parameters;
  object["active_parameters"] = cost.active;
  object["steps"] = config.run.steps;
  object["tokens_per_step"] = config.tokens_per_step();
  object["tokens"] = config.tokens_per_step() * config.run.steps;
  object["flops_per_token"] = cost.flops_per_token;
  object["bytes_weights"] = cost.bytes_weights;
  object["bytes_gradients"] = cost.bytes_gradients;
  object["bytes_optimizer"] = cost.bytes_optimizer;
  return object;
}

int dry_run(const train::TrainConfig& config, bool json) {
  const train::Sources sources = train::open_sources(config);
  const train::TrainingCost cost = train::training_cost(config);
  if (json) {
    write_json_line(plan_json(config, cost));
    return 0;
  }
  const Config& shape = config.model.shape;
  const double flops =
      cost.flops_per_token * static_cast<double>(config.tokens_per_step() * config.run.steps);
  const bool endless = sources.train->rows() == train::kEndlessRows;
  std::string text;
  text += fmt::format("model        {} layers ({} KDA, {} GDN, {} MLA), hidden {}, vocabulary {}\n",
                      shape.layer_count(), shape.count(LayerKind::kKda), shape.count(LayerKind::kGdn),
                      shape.count(LayerKind::kMla), shape.hidden, with_commas(shape.vocab_size));
  text += fmt::format("parameters   {}, of which a token uses {} besides the embedding\n",
                      with_commas(cost.parameters), with_commas(cost.active));
  text += fmt::format("training     {} steps of {} tokens ({} x {}, in {} parts): {} tokens\n",
                      with_commas(config.run.steps), with_commas(config.tokens_per_step()),
                      config.batch.sequences, config.data.sequence, config.batch.accumulate,
                      with_commas(config.run.steps * config.tokens_per_step()));
  if (!endless) {
    const auto rows = static_cast<int64_t>(sources.train->rows());
    text += fmt::format(
        "data         {} rows, {:.2f} passes over them\n", with_commas(rows),
        static_cast<double>(config.run.steps * config.batch.sequences) / static_cast<double>(rows));
  }
  text += fmt::format("arithmetic   {:.3g} FLOP a token, {:.3g} in all\n", cost.flops_per_token, flops);
  text += fmt::format("memory       weights {}, gradients {}, optimizer {}; activations come on top\n",
                      megabytes(cost.bytes_weights), megabytes(cost.bytes_gradients),
                      megabytes(cost.bytes_optimizer));
  text += fmt::format("output       {}\n", config.run.out);
  write_out(text);
  for (const std::string& note : sources.notes) log_line(note);
  return 0;
}

int run(const Options& options) {
  std::vector<std::string> overrides = options.overrides;
  if (!options.out.empty()) overrides.push_back("run.out=" + options.out);
  const train::TrainConfig config = train::read_train_config(options.config, overrides);
  if (options.dry_run) return dry_run(config, options.run.json);
  return run_training(config, options.run);
}

}  // namespace

Command add_train(const App& parent) {
  const auto options = std::make_shared<Options>();
  const App app = parent.add_subcommand("train", "pretrain, fine-tune, LoRA, synthetic tasks");
  app.footer(kFooter);
  app.add_option("--config", options->config, "what to train, as TOML").type_name("FILE").required();
  app.add_option("--set", options->overrides, "a key's value instead of the file's, e.g. optimizer.lr=1e-3")
      .type_name("KEY=VALUE")
      .one_value_each();
  app.add_option("--out", options->out, "the directory of the run: --set run.out=DIR").type_name("DIR");
  app.add_flag("--resume", options->run.resume,
               "go on from the newest checkpoint, or begin if there is none");
  app.add_flag("--accept-changes", options->run.accept_changes,
               "with --resume: although keys differ from those that the run began with");
  app.add_flag("--dry-run", options->dry_run, "check everything, print what would be trained, and exit");
  app.add_flag("--progress", options->run.progress, "a line of progress for each update");
  app.add_flag("--json", options->run.json, "print one JSON object");
  return {app, [options] { return run(*options); }};
}

}  // namespace kilin::cli
