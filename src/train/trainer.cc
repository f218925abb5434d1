// SPDX-License-Identifier: Apache-2.0
#include "train/trainer.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <c10/core/DeviceGuard.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <filesystem>
#include <memory>

#include "base/cpu.h"
#include "base/error.h"
#include "train/checkpoint.h"
#include "train/compute.h"
#include "train/cost.h"
#include "train/model_section.h"
#include "train/run_log.h"
#include "train/sources.h"

namespace kilin::train {
namespace {

using Clock = std::chrono::steady_clock;

constexpr int64_t kTail = 10;  // the last tenth of the run gives its training loss

double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

at::Device device_of(const TrainConfig& config, const Ranks& ranks) {
  if (config.run.device == "cpu") return at::kCPU;
  check(at::hasCUDA(), "{}: key 'run.device': found \"cuda\", but this machine's torch has no CUDA device",
        config.file);
  return {at::kCUDA, static_cast<c10::DeviceIndex>(ranks.local)};
}

class Trainer {
 public:
  Trainer(const TrainConfig& config, const TrainHooks& hooks);
  TrainResult run();

 private:
  // One update's numbers, summed over all processes.
  struct Step {
    double loss = 0, accuracy = 0, grad_norm = 0, rate = 0;
    int64_t tokens = 0;
    bool interrupted = false;
  };

  void check_batch() const;
  std::optional<int64_t> find_checkpoint();
  void make_model(const std::optional<int64_t>& from);
  void check_same_config() const;
  Step update();
  std::vector<PackedRows> read_rows() const;
  void balance_router();
  void account(const Step& step, double seconds);
  void write_log(const Step& step);
  void evaluate_and_log();
  void save();
  TrainResult result(bool interrupted) const;
  bool at(int64_t every) const { return every > 0 && state_.step % every == 0; }
  void say(const std::string& line) const {
    if (group_->first() && hooks_.log) hooks_.log(line);
  }

  const TrainConfig& config_;
  const TrainHooks& hooks_;
  const Ranks ranks_ = ranks_from_environment();
  const at::Device device_;
  const c10::OptionalDeviceGuard current_device_;
  std::unique_ptr<ProcessGroup> group_;
  Sources sources_;
  std::unique_ptr<RunDirectory> directory_;
  std::unique_ptr<TorchModel> model_;
  std::unique_ptr<Optimizer> optimizer_;
  std::unique_ptr<RunLog> log_;
  TrainerState state_;
  TrainingCost cost_;
  double peak_ = 0;
  double recent_rate_ = 0;  // tokens per second
  int64_t logged_tokens_ = 0;
  double logged_seconds_ = 0;
  int64_t saved_step_ = -1;
  std::optional<Evaluation> evaluation_;
};

Trainer::Trainer(const TrainConfig& config, const TrainHooks& hooks)
    : config_(config), hooks_(hooks), device_(device_of(config, ranks_)), current_device_(device_) {
  at::set_num_threads(config.run.threads > 0 ? config.run.threads : physical_cores());
  check_batch();
  sources_ = open_sources(config);
  group_ = ProcessGroup::create(ranks_, device_.is_cuda());
  for (const std::string& note : sources_.notes) say(note);
  const auto from = find_checkpoint();
  make_model(from);
  cost_ = training_cost(config);
  peak_ = measure_peak_flops(device_, config.precision.autocast_bf16);
  if (group_->first()) log_ = std::make_unique<RunLog>(directory_->path(), state_.step);
}

void Trainer::check_batch() const {
  const int64_t parts = config_.batch.accumulate * ranks_.size;
  check(config_.batch.sequences % parts == 0,
        "{}: key 'batch.sequences': found {}, expected a multiple of {} (accumulate x {} processes)",
        config_.file, config_.batch.sequences, parts, ranks_.size);
}

// The first process makes and cleans the directory, the others wait for it. The step to go on from.
std::optional<int64_t> Trainer::find_checkpoint() {
  if (group_->first()) {
    directory_ = std::make_unique<RunDirectory>(config_.run.out);
    directory_->clean();
  }
  group_->barrier();
  if (!group_->first()) directory_ = std::make_unique<RunDirectory>(config_.run.out);
  const auto latest = directory_->latest();
  if (hooks_.resume) return latest;
  check(
      !latest,
      "{}: holds checkpoints of a run already: --resume goes on from step {}, --out names another directory",
      config_.run.out, latest.value_or(0));
  return std::nullopt;
}

void Trainer::make_model(const std::optional<int64_t>& from) {
  ModelOptions options;
  options.device = device_;
  options.autocast_bf16 = config_.precision.autocast_bf16;
  options.checkpoint_activations = config_.precision.checkpoint_activations;
  const std::string directory = from ? directory_->checkpoint(*from) : "";
  if (from) {
    state_ = read_trainer_state(RunDirectory::state_file(directory));
    check_same_config();
    model_ = std::make_unique<TorchModel>(load_checkpoint_model(directory, config_, options));
    const std::string difference = shape_difference(model_->config(), config_.model.shape);
    check(difference.empty(), "{}: section [model]: the checkpoint {} has another shape: {}", config_.file,
          directory, difference);
  } else if (config_.model.from == ModelFrom::kCheckpoint) {
    model_ = std::make_unique<TorchModel>(TorchModel::load(config_.model.path, options));
  } else {
    model_ = std::make_unique<TorchModel>(TorchModel::random(config_.model.shape, config_.run.seed, options));
  }
  if (config_.lora && !from) {
    try {
      model_->add_lora({config_.lora->targets, config_.lora->rank, config_.lora->alpha, config_.run.seed});
    } catch (const Error& error) {
      fail("{}: key 'lora.targets': {}", config_.lora->place, error.what());
    }
  }
  optimizer_ = std::make_unique<Optimizer>(config_.optimizer,
                                           config_.lora ? model_->lora_parameters() : model_->parameters());
  if (!from) return;
  restore_exactly(directory, *model_, *optimizer_, state_.step);
  saved_step_ = state_.step;
  logged_tokens_ = state_.tokens;
  logged_seconds_ = state_.seconds;
  say(fmt::format("going on from step {} ({})", state_.step, directory));
}

void Trainer::check_same_config() const {
  const auto changed = differences(state_.config, config_.flat);
  if (changed.empty()) return;
  if (!hooks_.accept_changes) {
    fail("{}: {}{} (--accept-changes goes on although the run began otherwise)", config_.file,
         changed.front(), changed.size() > 1 ? fmt::format(", and {} more", changed.size() - 1) : "");
  }
  for (const std::string& line : changed) say(line);
}

// This process's share of the rows of the next update, a part for each turn of the accumulation. Part p of
// all processes together is the p'th piece of the step's rows, so that the rows do not depend on how many
// there are.
std::vector<PackedRows> Trainer::read_rows() const {
  const int64_t per_part = config_.batch.sequences / config_.batch.accumulate;
  const int64_t own = per_part / group_->size();
  std::vector<PackedRows> parts(static_cast<size_t>(config_.batch.accumulate));
  for (size_t part = 0; part < parts.size(); ++part) {
    const int64_t first =
        state_.step * config_.batch.sequences + static_cast<int64_t>(part) * per_part + group_->rank() * own;
    for (int64_t row = first; row < first + own; ++row)
      append_training_row(*sources_.train, config_.run.seed, static_cast<uint64_t>(row), parts[part]);
  }
  return parts;
}

Trainer::Step Trainer::update() {
  const std::vector<PackedRows> parts = read_rows();
  int64_t tokens = 0;
  int64_t counted = 0;
  for (const PackedRows& part : parts) {
    tokens += static_cast<int64_t>(part.tokens.size());
    counted += part.counted();
  }
  at::Tensor counts = at::tensor({tokens, counted}, at::kLong).to(device_);
  group_->sum(counts);
  const auto total = counts[1].item<int64_t>();
  check(total > 0, "step {}: the batch has no token to learn", state_.step + 1);
  optimizer_->zero_gradients();
  const bool accuracy = config_.data.kind == DataKind::kSynthetic;
  // loss, right answers, wish to stop
  at::Tensor sums = at::zeros({3}, at::TensorOptions().dtype(at::kDouble).device(device_));
  for (const PackedRows& part : parts) {
    if (part.counted() == 0) continue;
    const RowLoss loss = row_loss(*model_, part, accuracy);
    (loss.sum / static_cast<double>(total)).backward();
    sums[0] += loss.sum.detach();
    if (accuracy) sums[1] += loss.correct.sum();
  }
  if (hooks_.interrupted && hooks_.interrupted()) sums[2] += 1;
  group_->sum(optimizer_->gradients());
  group_->sum(sums);
  const at::Tensor values = sums.to(at::kCPU);
  Step step;
  step.tokens = counts[0].item<int64_t>();
  step.loss = values[0].item<double>() / static_cast<double>(total);
  step.accuracy = values[1].item<double>() / static_cast<double>(total);
  step.interrupted = values[2].item<double>() > 0;
  step.rate = config_.schedule.rate(state_.step);
  step.grad_norm = optimizer_->clip_gradients();
  const bool finite = std::isfinite(step.loss) && std::isfinite(step.grad_norm);
  if (!finite) {
    const auto kept = directory_->latest();
    fail(
        "step {}: the {} is {}, training cannot go on (a lower optimizer.lr or more schedule.warmup may "
        "help); {}",
        state_.step + 1, std::isfinite(step.loss) ? "norm of the gradients" : "loss",
        std::isfinite(step.loss) ? step.grad_norm : step.loss,
        kept ? "the last good checkpoint is " + directory_->checkpoint(*kept)
             : "no checkpoint was written yet");
  }
  optimizer_->step(step.rate);
  balance_router();
  return step;
}

void Trainer::balance_router() {
  if (model_->router_counts().empty()) return;
  if (config_.router_bias_rate == 0 || config_.lora) return model_->reset_router_counts();
  for (RouterCounts& layer : model_->router_counts()) group_->sum(layer.counts);
  model_->update_router_bias(config_.router_bias_rate);
}

void Trainer::account(const Step& step, double seconds) {
  ++state_.step;
  state_.tokens += step.tokens;
  state_.seconds += seconds;
  state_.loss_sum += step.loss;
  state_.accuracy_sum += step.accuracy;
  ++state_.loss_steps;
  if (state_.step > config_.run.steps - (config_.run.steps + kTail - 1) / kTail) {
    state_.tail_sum += step.loss;
    ++state_.tail_steps;
  }
  const double now = static_cast<double>(step.tokens) / seconds;
  recent_rate_ = recent_rate_ == 0 ? now : 0.9 * recent_rate_ + 0.1 * now;
  if (!hooks_.report || !group_->first()) return;
  StepReport report;
  report.step = state_.step;
  report.steps = config_.run.steps;
  report.loss = step.loss;
  report.rate = step.rate;
  report.grad_norm = step.grad_norm;
  report.tokens_per_second = recent_rate_;
  report.share_of_peak = recent_rate_ * cost_.flops_per_token / (peak_ * group_->size());
  report.seconds_left =
      static_cast<double>((config_.run.steps - state_.step) * config_.tokens_per_step()) / recent_rate_;
  if (config_.data.kind == DataKind::kSynthetic) report.accuracy = step.accuracy;
  hooks_.report(report);
}

// Losses are means over the updates since the last record.
void Trainer::write_log(const Step& step) {
  if (group_->first()) {
    LogRecord record;
    record.step = state_.step;
    record.tokens = state_.tokens;
    record.seconds = state_.seconds;
    record.loss = state_.loss_sum / static_cast<double>(state_.loss_steps);
    if (config_.data.kind == DataKind::kSynthetic)
      record.accuracy = state_.accuracy_sum / static_cast<double>(state_.loss_steps);
    record.grad_norm = step.grad_norm;
    record.lr = step.rate;
    record.tokens_per_second =
        static_cast<double>(state_.tokens - logged_tokens_) / (state_.seconds - logged_seconds_);
    record.share_of_peak = *record.tokens_per_second * cost_.flops_per_token / (peak_ * group_->size());
    log_->write(record);
  }
  logged_tokens_ = state_.tokens;
  logged_seconds_ = state_.seconds;
  state_.loss_sum = state_.accuracy_sum = 0;
  state_.loss_steps = 0;
}

void Trainer::evaluate_and_log() {
  if (sources_.valid == nullptr) return;
  const auto rows = static_cast<int64_t>(sources_.valid->rows());
  const int64_t wanted =
      config_.data.valid_sequences > 0 ? std::min(rows, config_.data.valid_sequences) : rows;
  const int64_t at_once = config_.batch.sequences / config_.batch.accumulate / group_->size();
  evaluation_ = evaluate(*model_, *sources_.valid, wanted, at_once, *group_);
  if (!group_->first()) return;
  LogRecord record;
  record.step = state_.step;
  record.tokens = state_.tokens;
  record.seconds = state_.seconds;
  record.valid_loss = evaluation_->loss;
  record.valid_perplexity = std::exp(evaluation_->loss);
  record.valid_accuracy = evaluation_->accuracy;
  record.valid_exact = evaluation_->exact;
  log_->write(record);
  say(fmt::format(
      "step {}: validation loss {:.4f}, perplexity {:.3f}, accuracy {:.2f} %, {:.2f} % of the sequences "
      "exact",
      state_.step, evaluation_->loss, *record.valid_perplexity, 100 * evaluation_->accuracy,
      100 * evaluation_->exact));
}

void Trainer::save() {
  if (saved_step_ == state_.step) return;
  saved_step_ = state_.step;
  if (group_->first()) {
    state_.config = config_.flat;
    write_checkpoint(*directory_, config_, *model_, *optimizer_, state_);
  }
  group_->barrier();
}

TrainResult Trainer::result(bool interrupted) const {
  TrainResult result;
  result.steps = state_.step;
  result.tokens = state_.tokens;
  result.seconds = state_.seconds;
  result.interrupted = interrupted;
  result.first_process = group_->first();
  if (const auto latest = directory_->latest()) result.checkpoint = directory_->checkpoint(*latest);
  if (state_.tail_steps > 0) result.train_loss = state_.tail_sum / static_cast<double>(state_.tail_steps);
  if (evaluation_) {
    result.valid_loss = evaluation_->loss;
    result.valid_perplexity = std::exp(evaluation_->loss);
    result.valid_accuracy = evaluation_->accuracy;
    result.valid_exact = evaluation_->exact;
  }
  result.peak_flops = peak_;
  if (state_.seconds > 0) {
    result.tokens_per_second = static_cast<double>(state_.tokens) / state_.seconds;
    result.share_of_peak = result.tokens_per_second * cost_.flops_per_token / (peak_ * group_->size());
  }
  return result;
}

TrainResult Trainer::run() {
  bool interrupted = false;
  while (state_.step < config_.run.steps && !interrupted) {
    const auto start = Clock::now();
    const Step step = update();
    account(step, seconds_since(start));
    interrupted = step.interrupted;
    const bool last = state_.step == config_.run.steps;
    if (at(config_.run.log_every) || last) write_log(step);
    if (at(config_.run.eval_every) && !last && !interrupted) evaluate_and_log();
    if (at(config_.run.save_every) || last || interrupted) save();
  }
  if (!interrupted) evaluate_and_log();
  if (config_.lora && config_.lora->merge && !interrupted && group_->first()) {
    model_->merge_lora();
    model_->save(config_.run.out + "/merged", config_.run.save_bf16 ? at::kBFloat16 : at::kFloat,
                 tokenizer_files(config_.model.tokenizer));
  }
  return result(interrupted);
}

}  // namespace

TrainResult train(const TrainConfig& config, const TrainHooks& hooks) { return Trainer(config, hooks).run(); }

}  // namespace kilin::train
