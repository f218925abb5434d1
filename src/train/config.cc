// SPDX-License-Identifier: Apache-2.0
#include "train/config.h"

#include <algorithm>
#include <filesystem>
#include <limits>
#include <set>

#include "base/error.h"
#include "train/model_section.h"
#include "train/rows.h"

namespace kilin::train {
namespace {

constexpr int64_t kMany = std::numeric_limits<int64_t>::max();
constexpr int64_t kMaxSequence = int64_t{1} << 24;
constexpr int64_t kMaxSequences = int64_t{1} << 20;

void check_file(const std::string& path, const std::string& place, const std::string& key) {
  std::error_code ignored;
  const auto status = std::filesystem::status(path, ignored);
  check(std::filesystem::exists(status), "{}: key '{}': file '{}' does not exist", place, key, path);
  check(!std::filesystem::is_directory(status), "{}: key '{}': '{}' is a directory, expected a file", place,
        key, path);
}

void read_synthetic(const TomlReader& data, DataConfig& config) {
  eval::SyntheticConfig& task = config.synthetic;
  const std::string name = data.string("task");
  try {
    task.kind = eval::synthetic_kind(name, "data.task");
  } catch (const Error&) {
    data.refuse("task", "\"palindrome\", \"mqar\" or \"stack\"");
  }
  task.length = config.sequence;
  task.vocabulary = data.integer_or("vocabulary", task.vocabulary, 2, 1 << 24);
  task.kv_pairs = data.integer_or("kv_pairs", 0, 0, kMaxSequence);
  task.power = data.number_or("power", task.power, 1e-6, 1);
  task.random_filler = data.boolean_or("random_filler", task.random_filler);
  task.stacks = data.integer_or("stacks", task.stacks, 1, 1 << 20);
  config.examples_per_row = data.integers("examples_per_row", 1, kMaxSequence);
  config.valid_sequences = data.integer_or("valid_sequences", 64, 1, kMaxSequences);
  try {
    task = eval::SyntheticTask(task).config();
    const SyntheticRows check_rows(task, eval::Split::kTrain, 1, config.examples_per_row);
  } catch (const Error& error) {
    fail("{}: section [data]: {}", data.place("task"), error.what());
  }
}

DataConfig read_data(const TomlReader& data) {
  DataConfig config;
  if (!data.has("kind")) data.refuse("kind", "\"tokens\", \"text\", \"synthetic\" or \"chat\"");
  const std::string kind = data.choice_or("kind", "", {"tokens", "text", "synthetic", "chat"});
  config.sequence = data.integer("sequence", 2, kMaxSequence);
  if (kind == "synthetic") {
    config.kind = DataKind::kSynthetic;
    read_synthetic(data, config);
    return config;
  }
  config.kind = kind == "tokens" ? DataKind::kTokens : kind == "text" ? DataKind::kText : DataKind::kChat;
  config.split_documents = config.kind == DataKind::kChat;
  if (config.kind != DataKind::kChat)
    config.split_documents = data.choice_or("packing", "stream", {"stream", "documents"}) == "documents";
  config.train = data.strings("train");
  config.valid = data.strings("valid");
  if (config.train.empty()) data.refuse("train", "a file or a list of files");
  for (const std::string key : {"train", "valid"}) {
    for (const std::string& path : key == "train" ? config.train : config.valid) {
      check_file(path, data.place(key), data.key_path(key));
      config.places.push_back(data.place(key));
    }
  }
  config.valid_sequences = data.integer_or("valid_sequences", 0, 0, kMaxSequences);
  return config;
}

OptimizerConfig read_optimizer(const TomlReader& section, double& rate) {
  OptimizerConfig config;
  const std::string kind = section.choice_or("kind", "adamw", {"adamw", "muon"});
  config.kind = kind == "muon" ? OptimizerKind::kMuon : OptimizerKind::kAdamW;
  rate = section.number("lr", 0, 10);
  config.beta1 = section.number_or("beta1", config.beta1, 0, 0.9999);
  config.beta2 = section.number_or("beta2", config.beta2, 0, 0.999999);
  config.epsilon = section.number_or("epsilon", config.epsilon, 1e-16, 1);
  config.weight_decay = section.number_or("weight_decay", config.weight_decay, 0, 10);
  config.decay_all = section.choice_or("decay", "matrices", {"matrices", "all"}) == "all";
  config.clip = section.number_or("clip", config.clip, 0, 1e9);
  if (kind == "muon") config.momentum = section.number_or("momentum", config.momentum, 0, 0.9999);
  return config;
}

Schedule read_schedule(const TomlReader& section, double peak, int64_t steps) {
  Schedule schedule;
  const std::string kind = section.choice_or("kind", "wsd", {"wsd", "cosine", "constant"});
  schedule.kind = kind == "wsd"      ? ScheduleKind::kWsd
                  : kind == "cosine" ? ScheduleKind::kCosine
                                     : ScheduleKind::kConstant;
  schedule.peak = peak;
  schedule.steps = steps;
  schedule.warmup = section.integer_or("warmup", std::min<int64_t>(100, steps / 10), 0, kMany);
  if (schedule.warmup > steps)
    section.refuse("warmup", fmt::format("at most the {} steps of the run", steps));
  if (schedule.kind != ScheduleKind::kConstant) schedule.floor_share = section.number_or("floor", 0, 0, 1);
  if (schedule.kind == ScheduleKind::kWsd) {
    schedule.decay = section.integer_or("decay", (steps - schedule.warmup) / 5, 0, kMany);
    if (schedule.decay > steps - schedule.warmup) {
      section.refuse("decay",
                     fmt::format("at most the {} steps behind the warm-up", steps - schedule.warmup));
    }
  }
  return schedule;
}

BatchConfig read_batch(const TomlReader& section, int64_t sequence) {
  BatchConfig config;
  if (section.has("tokens")) {
    const int64_t tokens = section.integer("tokens", 1, int64_t{1} << 40);
    if (section.has("sequences")) section.refuse("tokens", "either 'tokens' or 'sequences', not both");
    if (tokens % sequence != 0)
      section.refuse("tokens", fmt::format("a multiple of the {} tokens of data.sequence", sequence));
    config.sequences = tokens / sequence;
  } else {
    config.sequences = section.integer("sequences", 1, kMaxSequences);
  }
  config.accumulate = section.integer_or("accumulate", 1, 1, kMaxSequences);
  if (config.sequences % config.accumulate != 0) {
    section.refuse("accumulate", fmt::format("a divisor of the {} sequences of a step", config.sequences));
  }
  return config;
}

RunConfig read_run(const TomlReader& section, int64_t tokens_per_step) {
  RunConfig config;
  config.out = section.string("out");
  config.seed = static_cast<uint64_t>(section.integer_or("seed", 1, 0, kMany));
  if (section.has("tokens")) {
    if (section.has("steps")) section.refuse("tokens", "either 'tokens' or 'steps', not both");
    const int64_t tokens = section.integer("tokens", 1, kMany);
    config.steps = (tokens + tokens_per_step - 1) / tokens_per_step;
  } else {
    config.steps = section.integer("steps", 1, int64_t{1} << 40);
  }
  config.device = section.choice_or("device", "cpu", {"cpu", "cuda"});
  config.threads = static_cast<int>(section.integer_or("threads", 0, 0, 1024));
  config.log_every = section.integer_or("log_every", 10, 1, kMany);
  config.eval_every = section.integer_or("eval_every", 0, 0, kMany);
  config.save_every = section.integer_or("save_every", 0, 0, kMany);
  config.keep = section.integer_or("keep", 2, 1, 1 << 20);
  config.save_bf16 = section.choice_or("save_dtype", "fp32", {"fp32", "bf16"}) == "bf16";
  return config;
}

std::optional<LoraConfig> read_lora(const TomlReader& root) {
  const TomlReader section = root.section("lora");
  if (!root.has("lora")) return std::nullopt;
  LoraConfig config;
  config.rank = section.integer_or("rank", config.rank, 1, 4096);
  config.alpha = section.number_or("alpha", 2.0 * static_cast<double>(config.rank), 1e-6, 1e6);
  config.targets = section.strings("targets");
  if (config.targets.empty())
    section.refuse("targets", "a list of parameters, for example [\"q_proj\", \"v_proj\"] or \"all-linear\"");
  config.merge = section.boolean_or("merge", false);
  config.place = section.place("targets");
  return config;
}

// What only shows when sections meet.
void check_together(const TrainConfig& config, const TomlReader& root) {
  const TomlReader data = root.section("data");
  const TomlReader model = root.section("model");
  const int64_t vocabulary = config.model.shape.vocab_size;
  if (config.data.kind == DataKind::kSynthetic && config.data.synthetic.vocabulary > vocabulary) {
    fail("{}: key 'data.vocabulary': found {}, but the model has a vocabulary of {}",
         data.place("vocabulary"), config.data.synthetic.vocabulary, vocabulary);
  }
  const bool needs_tokenizer = config.data.kind == DataKind::kText || config.data.kind == DataKind::kChat;
  if (needs_tokenizer && config.model.tokenizer.empty()) {
    model.refuse("tokenizer", "the directory of a tokenizer, which data.kind = \"text\" and \"chat\" need");
  }
  if (config.lora && config.model.from != ModelFrom::kCheckpoint) {
    model.refuse("checkpoint", "a checkpoint, to which [lora] adds");
  }
  if (config.data.sequence > config.model.shape.max_length) {
    data.refuse("sequence", fmt::format("at most the model's max_position_embeddings = {}",
                                        config.model.shape.max_length));
  }
}

}  // namespace

TrainConfig read_train_config(const TomlTable& table, const std::string& file) {
  const TomlReader root(table, file);
  TrainConfig config;
  config.file = file;
  config.model = read_model_section(root.section("model"));
  config.data = read_data(root.section("data"));
  config.batch = read_batch(root.section("batch"), config.data.sequence);
  config.run = read_run(root.section("run"), config.tokens_per_step());
  double rate = 0;
  config.optimizer = read_optimizer(root.section("optimizer"), rate);
  config.schedule = read_schedule(root.section("schedule"), rate, config.run.steps);
  const TomlReader precision = root.section("precision");
  config.precision.autocast_bf16 = precision.choice_or("kind", "fp32", {"fp32", "bf16"}) == "bf16";
  config.precision.checkpoint_activations = precision.boolean_or("checkpoint_activations", false);
  config.router_bias_rate = root.section("moe").number_or("bias_rate", 1e-3, 0, 1);
  config.lora = read_lora(root);
  check_together(config, root);
  root.refuse_unknown();
  config.flat = flatten_toml(table);
  return config;
}

TrainConfig read_train_config(const std::string& path, const std::vector<std::string>& overrides) {
  TomlTable table = read_toml_file(path);
  for (const std::string& assignment : overrides) set_toml(table, assignment);
  return read_train_config(table, path);
}

std::vector<std::string> differences(const std::map<std::string, std::string>& before,
                                     const std::map<std::string, std::string>& now) {
  // These change when something is written and on what it runs, not what is trained.
  static const std::set<std::string> kFree{"run.out",        "run.log_every", "run.eval_every",
                                           "run.save_every", "run.keep",      "run.threads",
                                           "run.device",     "data.valid",    "data.valid_sequences"};
  std::set<std::string> keys;
  for (const auto& [key, text] : before) keys.insert(key);
  for (const auto& [key, text] : now) keys.insert(key);
  const auto shown = [](const std::map<std::string, std::string>& flat, const std::string& key) {
    const auto found = flat.find(key);
    return found == flat.end() ? std::string("not given") : found->second;
  };
  std::vector<std::string> result;
  for (const std::string& key : keys) {
    const std::string old = shown(before, key);
    const std::string current = shown(now, key);
    if (old != current && kFree.count(key) == 0)
      result.push_back(fmt::format("key '{}': {}, now {}", key, old, current));
  }
  return result;
}

}  // namespace kilin::train
