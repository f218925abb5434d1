// SPDX-License-Identifier: Apache-2.0
// kilin bench kda: the operator alone, chunked against token by token, and the gradients.
#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <functional>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "base/cpu.h"
#include "base/huge_memory.h"
#include "base/random.h"
#include "base/thread_pool.h"
#include "kernels/kda/kda.h"
#include "kernels/kda/kda_backward.h"
#include "kilin/bench.h"
#include "kilin/common.h"
#include "kilin/format.h"
#include "kilin/output.h"

namespace kilin::cli {
namespace {

constexpr const char* kFooter =
    R"(One sequence of random values: l2norm of q and k, softplus gate and sigmoid of
beta included. All forms compute the same: in chunks (prefill), token by token in
one call (recurrent), and token by token with a call for each (steps: decode).
With --backward the gradients of all inputs as well, in chunks.

Example:
  kilin bench kda --tokens 4096 --heads 32 --threads 1)";

struct KdaBenchOptions {
  BenchOptions bench;
  int tokens = 2048;
  int heads = 8;
  int dim = 128;
  bool backward = false;
};

// Random inputs of one sequence, and the arguments of the kernel that point at them.
class Inputs {
 public:
  explicit Inputs(const KdaBenchOptions& options) : cu_seqlens_{0, options.tokens} {
    const auto row = static_cast<int64_t>(options.heads) * options.dim;
    const auto size = static_cast<size_t>(options.tokens * row);
    q_ = normal(size);
    k_ = normal(size);
    v_ = normal(size);
    gate_ = normal(size);
    beta_ = normal(static_cast<size_t>(options.tokens) * static_cast<size_t>(options.heads));
    out_.resize(size);
    state_.resize(static_cast<size_t>(row * options.dim));
    a_log_.assign(static_cast<size_t>(options.heads), 1.0f);
    dt_bias_.assign(static_cast<size_t>(row), -4.0f);  // decays near those of trained models: slow
    fill_params(options, row);
  }
  Inputs(const Inputs&) = delete;
  Inputs& operator=(const Inputs&) = delete;

  const KdaParams& params() const { return params_; }
  // The same for the token at `index` alone.
  KdaParams token_params(int index) const {
    KdaParams p = params_;
    p.cu_seqlens = one_token_.data();
    p.q += index * p.q_stride;
    p.k += index * p.k_stride;
    p.v += index * p.v_stride;
    p.gate += index * p.gate_stride;
    p.beta += index * p.beta_stride;
    p.out += index * p.out_stride;
    return p;
  }
  void clear_state() { std::fill(state_.begin(), state_.end(), 0.0f); }

 private:
  HugeVector<float> normal(size_t count) {
    HugeVector<float> values(count);
    for (float& value : values) value = static_cast<float>(random_.normal());
    return values;
  }

  void fill_params(const KdaBenchOptions& options, int64_t row) {
    KdaParams& p = params_;
    p.heads = p.value_heads = options.heads;
    p.key_dim = p.value_dim = options.dim;
    p.sequences = 1;
    p.cu_seqlens = cu_seqlens_.data();
    p.slots = &slot_;
    p.q = q_.data();
    p.k = k_.data();
    p.v = v_.data();
    p.gate = gate_.data();
    p.beta = beta_.data();
    p.q_stride = p.k_stride = p.v_stride = p.gate_stride = p.out_stride = row;
    p.beta_stride = options.heads;
    p.a_log = a_log_.data();
    p.dt_bias = dt_bias_.data();
    p.beta_is_logit = true;
    p.scale = 1.0f / std::sqrt(static_cast<float>(options.dim));
    p.state = state_.data();
    p.slot_stride = row * options.dim;
    p.out = out_.data();
  }

  Random random_{1};
  std::array<int32_t, 2> cu_seqlens_;
  std::array<int32_t, 2> one_token_{0, 1};
  int32_t slot_ = 0;
  HugeVector<float> q_, k_, v_, gate_, beta_, a_log_, dt_bias_, state_, out_;
  KdaParams params_;
};

// The gradients of all inputs, for the same arguments.
class Gradients {
 public:
  explicit Gradients(const KdaParams& forward) {
    const int64_t tokens = forward.cu_seqlens[1];
    const auto size = static_cast<size_t>(tokens * forward.q_stride);
    for (HugeVector<float>* d : {&d_out_, &d_q_, &d_k_, &d_v_, &d_gate_}) d->assign(size, 0.01f);
    d_beta_.resize(static_cast<size_t>(tokens * forward.beta_stride));
    d_a_log_.resize(static_cast<size_t>(forward.value_heads));
    d_dt_bias_.resize(static_cast<size_t>(forward.q_stride));
    d_state_.resize(static_cast<size_t>(forward.slot_stride));
    params_.forward = forward;
    params_.d_out = d_out_.data();
    params_.d_q = d_q_.data();
    params_.d_k = d_k_.data();
    params_.d_v = d_v_.data();
    params_.d_gate = d_gate_.data();
    params_.d_beta = d_beta_.data();
    params_.d_a_log = d_a_log_.data();
    params_.d_dt_bias = d_dt_bias_.data();
    params_.d_state = d_state_.data();
    params_.d_slot_stride = forward.slot_stride;
    params_.d_out_stride = params_.d_q_stride = params_.d_k_stride = params_.d_v_stride = forward.q_stride;
    params_.d_gate_stride = forward.gate_stride;
    params_.d_beta_stride = forward.beta_stride;
  }
  Gradients(const Gradients&) = delete;
  Gradients& operator=(const Gradients&) = delete;

  const KdaBackwardParams& params() const { return params_; }
  void clear_state() { std::fill(d_state_.begin(), d_state_.end(), 0.0f); }

 private:
  HugeVector<float> d_out_, d_q_, d_k_, d_v_, d_gate_, d_beta_, d_a_log_, d_dt_bias_, d_state_;
  KdaBackwardParams params_;
};

// Rates in tokens per second.
struct Result {
  Rates chunk;
  Rates recurrent;  // one call for all tokens
  Rates steps;      // a call per token, as decode does it
  Rates backward;   // with --backward
  double chunk_flops = 0;
  double backward_flops = 0;
  double bytes_per_token = 0;
};

Result measure(const KdaBenchOptions& options, ThreadPool& pool) {
  Inputs inputs(options);
  const auto tokens = static_cast<double>(options.tokens);
  const auto rates = [&](const std::function<void()>& compute) {
    compute();  // warms caches and threads
    return measure_rates(
        options.bench.repeat, tokens, [&] { inputs.clear_state(); }, compute);
  };
  Result result;
  result.chunk = rates([&] { kda_chunk(inputs.params(), pool); });
  result.recurrent = rates([&] { kda_recurrent(inputs.params(), pool); });
  result.steps = rates([&] {
    for (int i = 0; i < options.tokens; ++i) kda_recurrent(inputs.token_params(i), pool);
  });
  if (options.backward) {
    inputs.clear_state();
    Gradients gradients(inputs.params());
    const auto compute = [&] { kda_backward(gradients.params(), pool); };
    compute();
    result.backward = measure_rates(
        options.bench.repeat, tokens, [&] { gradients.clear_state(); }, compute);
    result.backward_flops = kda_backward_flops(inputs.params());
  }
  result.chunk_flops = kda_chunk_flops(inputs.params());
  result.bytes_per_token = kda_bytes(inputs.params()) / tokens;
  return result;
}

nlohmann::ordered_json to_json(const Result& result, const KdaBenchOptions& options, const Machine& machine) {
  const double tokens = options.tokens;
  nlohmann::ordered_json json;
  json["bench"] = "kda";
  json["tokens"] = options.tokens;
  json["heads"] = options.heads;
  json["dim"] = options.dim;
  json["threads"] = machine.threads;
  json["isa"] = isa_name(active_isa());
  json["repeats"] = options.bench.repeat;
  json["tokens_per_second"] = result.chunk.median;
  json["tokens_per_second_range"] = to_json(result.chunk);
  json["chunk_ms"] = 1e3 * tokens / result.chunk.median;
  json["recurrent_ms"] = 1e3 * tokens / result.recurrent.median;
  json["steps_ms"] = 1e3 * tokens / result.steps.median;
  json["ratio"] = result.chunk.median / result.recurrent.median;
  json["ratio_to_steps"] = result.chunk.median / result.steps.median;
  json["bytes_per_token"] = result.bytes_per_token;
  if (options.backward) {
    const double backward_flops = result.backward_flops / tokens * result.backward.median;
    json["backward_ms"] = 1e3 * tokens / result.backward.median;
    json["backward_ratio"] = result.chunk.median / result.backward.median;
    json["backward_flops_per_second"] = backward_flops;
    json["backward_share_of_peak"] = backward_flops / machine.flops_per_second;
  }
  const double flops = result.chunk_flops / tokens * result.chunk.median;
  json["flops_per_second"] = flops;
  json["share_of_peak"] = flops / machine.flops_per_second;
  json["share_of_bandwidth"] = result.bytes_per_token * result.chunk.median / machine.read_bytes_per_second;
  json["bandwidth_bytes_per_second"] = machine.read_bytes_per_second;
  json["peak_flops_per_second"] = machine.flops_per_second;
  return json;
}

int run(const KdaBenchOptions& options) {
  ThreadPool pool(threads_of(options.bench));
  const Result result = measure(options, pool);
  const Machine machine = probe_machine(pool.size());
  if (options.bench.json) {
    write_json_line(to_json(result, options, machine));
    return 0;
  }
  const double tokens = options.tokens;
  const double flops = result.chunk_flops / tokens * result.chunk.median;
  const auto times = [&](const Rates& rates) {
    return fmt::format("{:.2f} ms (median; {:.2f} to {:.2f}), {} tokens/s", 1e3 * tokens / rates.median,
                       1e3 * tokens / rates.high, 1e3 * tokens / rates.low, human_rate(rates.median));
  };
  write_out(describe(machine) + "\n");
  write_out(fmt::format("shape     {} tokens, {} heads, key and value width {}\n",
                        with_commas(options.tokens), options.heads, options.dim));
  write_out(fmt::format("chunked   {}\n          {:.1f} GFLOP/s, {} of the machine's multiply-adds\n",
                        times(result.chunk), flops / 1e9, percent(flops / machine.flops_per_second)));
  write_out(fmt::format("recurrent {}\n", times(result.recurrent)));
  write_out(fmt::format("steps     {}\n", times(result.steps)));
  write_out(fmt::format(
      "ratio     chunks are {:.2f} times as fast as the recurrence, {:.2f} times as fast as steps\n",
      result.chunk.median / result.recurrent.median, result.chunk.median / result.steps.median));
  if (!options.backward) return 0;
  const double backward_flops = result.backward_flops / tokens * result.backward.median;
  write_out(fmt::format(
      "backward  {}\n          {:.1f} GFLOP/s, {} of the machine's multiply-adds, {:.2f} times the time of "
      "chunks\n",
      times(result.backward), backward_flops / 1e9, percent(backward_flops / machine.flops_per_second),
      result.chunk.median / result.backward.median));
  return 0;
}

}  // namespace

Command add_bench_kda(const App& parent) {
  const auto options = std::make_shared<KdaBenchOptions>();
  const App app = parent.add_subcommand("kda", "the KDA operator alone, chunked and token by token");
  app.footer(kFooter);
  const auto add = [&](const char* name, int& value, double high, const char* text) {
    app.add_option(name, value, text)
        .type_name("N")
        .check(in_range(1, high, fmt::format("a whole number from 1 to {:.0f}", high)))
        .capture_default_str();
  };
  add("--tokens", options->tokens, 1 << 20, "length of the sequence");
  add("--heads", options->heads, 1024, "heads");
  add("--dim", options->dim, 256, "width of keys and values per head");
  app.add_flag("--backward", options->backward, "the gradients as well");
  add_bench_options(app, options->bench);
  add_threads_option(app, options->bench.threads);
  return {app, [options] { return run(*options); }};
}

}  // namespace kilin::cli
