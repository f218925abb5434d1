// SPDX-License-Identifier: Apache-2.0
// What several subcommands share: options of models and of sampling, reading inputs, clocks.
#pragma once
#include <kilin/kilin.h>

#include <chrono>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "kilin/arguments.h"

namespace kilin::cli {

struct ModelArguments {
  std::string path;
  int threads = 0;
  std::string device = "cpu";
  std::string compatibility = "transformers";
  int64_t prefill_chunk = 2048;
  std::string cache_type = "auto";
  std::string activations = "auto";
  bool pin = false;
  std::vector<std::string> lora;  // DIR or DIR:SCALE
};

// The positional MODEL; then --threads, --device, --compat, --prefill-chunk, --cache-type,
// --activations, --pin and --lora.
void add_model_argument(const App& app, ModelArguments& arguments);
void add_engine_options(const App& app, ModelArguments& arguments);
void add_threads_option(const App& app, int& threads);
void add_cache_options(const App& app, ModelArguments& arguments);  // --cache-type, --activations, --pin

// "DIR" or "DIR:SCALE"; a directory that exists under the whole name is that one. Throws Error for a bad
// scale.
LoraSource lora_source(const std::string& text);

ModelOptions model_options(const ModelArguments& arguments);
// Without need_tokenizer the tokenizer is loaded if the checkpoint has one.
Model load_model(const ModelArguments& arguments, bool need_tokenizer);

// --temperature, --top-k, --top-p, --min-p, --repetition-penalty, --seed; defaults as they are in `sampling`.
void add_sampling_options(const App& app, SamplingOptions& sampling);

// The whole of a file; "-" is standard input. Errors name the file.
std::string read_input(const std::string& path);

// Throws Error naming `what` when the text is not UTF-8.
void check_text(std::string_view text, std::string_view what);

class Stopwatch {
 public:
  double seconds() const { return std::chrono::duration<double>(Clock::now() - start_).count(); }

 private:
  using Clock = std::chrono::steady_clock;
  Clock::time_point start_ = Clock::now();
};

}  // namespace kilin::cli
