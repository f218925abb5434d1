// SPDX-License-Identifier: Apache-2.0
#include "kilin/train_run.h"

#include <fmt/format.h>

#include <chrono>
#include <nlohmann/json.hpp>

#include "kilin/format.h"
#include "kilin/interrupt.h"
#include "kilin/output.h"
#include "train/trainer.h"

namespace kilin::cli {
namespace {

using Clock = std::chrono::steady_clock;

constexpr auto kRedraw = std::chrono::milliseconds(200);
constexpr auto kLogEvery = std::chrono::seconds(10);

void put(const std::string& text) {
  std::fwrite(text.data(), 1, text.size(), stderr);
  std::fflush(stderr);
}

std::string line_of(const train::StepReport& report) {
  std::string line = fmt::format("step {} / {}  loss {:.4f}", report.step, report.steps, report.loss);
  if (report.accuracy) line += fmt::format("  accuracy {:.1f} %", 100 * *report.accuracy);
  return line + fmt::format("  lr {:.3g}  grad {:.3g}  {} tokens/s  {:.1f} % of peak  {} left", report.rate,
                            report.grad_norm, human_rate(report.tokens_per_second),
                            100 * report.share_of_peak, human_duration(report.seconds_left));
}

// One line that is redrawn on a terminal; elsewhere a line every few seconds.
class TrainProgress {
 public:
  explicit TrainProgress(bool every_step) : every_step_(every_step), terminal_(is_terminal(STDERR_FILENO)) {}
  void show(const train::StepReport& report) {
    const auto now = Clock::now();
    const bool last = report.step == report.steps;
    if (!every_step_ && !last && now < next_) return;
    next_ = now + (terminal_ ? Clock::duration(kRedraw) : Clock::duration(kLogEvery));
    put(terminal_ ? "\r\x1b[K" + line_of(report) + (last ? "\n" : "") : line_of(report) + "\n");
    drawn_ = terminal_ && !last;
  }
  void log(const std::string& line) {
    end();
    log_line(line);
  }
  void end() {
    if (drawn_) put("\n");
    drawn_ = false;
  }

 private:
  bool every_step_;
  bool terminal_;
  bool drawn_ = false;
  Clock::time_point next_;
};

void print(const train::TrainResult& result, bool json) {
  if (json) {
    nlohmann::ordered_json object;
    const auto put_if = [&](const char* key, const std::optional<double>& value) {
      if (value) object[key] = *value;
    };
    object["steps"] = result.steps;
    object["tokens"] = result.tokens;
    object["seconds"] = result.seconds;
    object["checkpoint"] = result.checkpoint;
    object["interrupted"] = result.interrupted;
    put_if("train_loss", result.train_loss);
    put_if("valid_loss", result.valid_loss);
    put_if("valid_perplexity", result.valid_perplexity);
    put_if("valid_accuracy", result.valid_accuracy);
    put_if("valid_exact", result.valid_exact);
    object["tokens_per_second"] = result.tokens_per_second;
    object["share_of_peak"] = result.share_of_peak;
    object["peak_flops"] = result.peak_flops;
    write_json_line(object);
    return;
  }
  std::string line = fmt::format("{} steps, {} tokens", result.steps, with_commas(result.tokens));
  if (result.train_loss) line += fmt::format("   training loss {:.4f}", *result.train_loss);
  if (result.valid_loss) {
    line += fmt::format("   validation loss {:.4f}, perplexity {:.3f}, accuracy {:.2f} %", *result.valid_loss,
                        *result.valid_perplexity, 100 * *result.valid_accuracy);
  }
  write_out(line + "\n");
  write_out("checkpoint: " + result.checkpoint + "\n");
}

}  // namespace

int run_training(const train::TrainConfig& config, const TrainOptions& options) {
  const InterruptScope interrupt;
  TrainProgress progress(options.progress);
  train::TrainHooks hooks;
  hooks.resume = options.resume;
  hooks.accept_changes = options.accept_changes;
  hooks.report = [&](const train::StepReport& report) { progress.show(report); };
  hooks.log = [&](const std::string& line) { progress.log(line); };
  hooks.interrupted = [&] { return interrupt.interrupted(); };
  const train::TrainResult result = train::train(config, hooks);
  progress.end();
  if (!result.first_process) return result.interrupted ? kInterruptedExit : 0;
  if (result.interrupted) log_line(fmt::format("interrupted after step {}; --resume goes on", result.steps));
  print(result, options.json);
  log_line(fmt::format("{} in {}, {} tokens/s, {:.1f} % of the {:.1f} GFLOP/s measured",
                       with_commas(result.tokens) + " tokens", human_duration(result.seconds),
                       human_rate(result.tokens_per_second), 100 * result.share_of_peak,
                       result.peak_flops / 1e9));
  return result.interrupted ? kInterruptedExit : 0;
}

}  // namespace kilin::cli
