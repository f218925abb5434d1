// SPDX-License-Identifier: Apache-2.0
// kilin bench prefill, kilin bench decode: a whole model.
#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <nlohmann/json.hpp>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "base/cpu.h"
#include "base/error.h"
#include "base/random.h"
#include "base/thread_pool.h"
#include "io/gguf.h"
#include "kernels/kda/kda.h"
#include "kilin/bench.h"
#include "kilin/common.h"
#include "kilin/format.h"
#include "kilin/machine_probe.h"
#include "kilin/output.h"
#include "kilin/progress.h"
#include "model/config.h"
#include "model/gguf_config.h"

namespace kilin::cli {
namespace {

constexpr const char* kPrefillFooter =
    R"(GFLOP/s counts 2 x active parameters per token (the output head once) and
attention: per MLA layer the causal pairs of positions, per KDA layer the chunked
form. --config takes the shape of a config.json and random weights.

Examples:
  kilin bench prefill models/kilin-docs-10m --tokens 2048
  kilin bench prefill --config config.json --tokens 512 --threads 1 --json)";

constexpr const char* kDecodeFooter =
    R"(Bytes per token: the weights a token uses, the states of KDA layers (read and
written) and the cache of MLA layers at that depth (read). Their rate is compared
with reading memory, measured before and after each repeat; a model that stays in
a cache can exceed 100 %.

Examples:
  kilin bench decode models/kilin-docs-10m --depth 4096 --tokens 64
  kilin bench decode --config config.json --depth 0 --json)";

struct ModelBenchOptions {
  BenchOptions bench;
  ModelArguments model;
  std::string config;
  int64_t tokens = 0;
  int64_t depth = 0;
};

Model load(const ModelBenchOptions& options) {
  if (options.model.path.empty() == options.config.empty()) {
    throw UsageError("exactly one of MODEL and --config is needed");
  }
  ModelArguments arguments = options.model;
  arguments.threads = threads_of(options.bench);
  if (options.config.empty()) return load_model(arguments, false);
  return Model::random(options.config, 1, model_options(arguments));
}

Config config_of(const ModelBenchOptions& options) {
  const std::string& model = options.model.path;
  if (io::GgufFile::is_gguf(model)) {
    return read_gguf_config(io::GgufFile::open(model), compatibility(options.model.compatibility));
  }
  return read_config_file(options.config.empty() ? model + "/config.json" : options.config,
                          options.model.compatibility);
}

std::vector<int32_t> random_tokens(int64_t count, int64_t vocab_size) {
  Random random(1);
  std::vector<int32_t> ids;
  for (int64_t i = 0; i < count; ++i) {
    ids.push_back(static_cast<int32_t>(random.below(static_cast<uint64_t>(vocab_size))));
  }
  return ids;
}

// Of one linear attention layer over `tokens` tokens.
double linear_attention_flops(const LinearAttentionConfig& c, int64_t tokens) {
  const std::vector<int32_t> cu_seqlens{0, static_cast<int32_t>(tokens)};
  KdaParams params;
  params.sequences = 1;
  params.cu_seqlens = cu_seqlens.data();
  params.heads = static_cast<int>(c.heads);
  params.value_heads = static_cast<int>(c.value_heads);
  params.key_dim = static_cast<int>(c.key_dim);
  params.value_dim = static_cast<int>(c.value_dim);
  return kda_chunk_flops(params);
}

double prefill_flops(const Config& c, const ModelInfo& info, int64_t tokens) {
  const auto count = static_cast<double>(tokens);
  const double head = static_cast<double>(c.vocab_size) * static_cast<double>(c.hidden);
  const double matrices = 2 * (static_cast<double>(info.active_parameters) - head) * count + 2 * head;
  const double pairs = count * (count + 1) / 2;
  const auto width = static_cast<double>(c.mla.heads * (c.mla.nope + c.mla.rope + c.mla.value));
  const double latent = static_cast<double>(info.mla_layers) * 2 * width * pairs;
  const auto linear_layers = static_cast<double>(info.kda_layers + info.gdn_layers);
  const double linear = linear_layers > 0 ? linear_layers * linear_attention_flops(c.linear, tokens) : 0;
  return matrices + latent + linear;
}

// What one token reads and writes at a depth.
double decode_bytes(const ModelInfo& info, double depth) {
  return static_cast<double>(info.active_weight_bytes) +
         2.0 * static_cast<double>(info.state_bytes_per_sequence) +
         static_cast<double>(info.cache_bytes_per_token) * depth;
}

nlohmann::ordered_json common_json(const char* name, const ModelBenchOptions& options, const ModelInfo& info,
                                   const Rates& rates, const Machine& machine) {
  nlohmann::ordered_json json;
  json["bench"] = name;
  json["model"] = info.path;
  json["parameters"] = info.parameters;
  json["active_parameters"] = info.active_parameters;
  json["tokens"] = options.tokens;
  json["threads"] = machine.threads;
  json["isa"] = isa_name(active_isa());
  json["activations"] = info.activations;
  json["repeats"] = options.bench.repeat;
  json["tokens_per_second"] = rates.median;
  json["tokens_per_second_range"] = to_json(rates);
  json["bandwidth_bytes_per_second"] = machine.read_bytes_per_second;
  json["peak_flops_per_second"] = machine.flops_per_second;
  return json;
}

std::string speed_line(const char* name, const Rates& rates, const ModelInfo& info) {
  return fmt::format("{:<9} {} tokens/s (median; {} to {}), activations {}\n", name, human_rate(rates.median),
                     human_rate(rates.low), human_rate(rates.high), info.activations);
}

std::string model_line(const ModelInfo& info) {
  return fmt::format("model     {}: {} parameters, {} active, {} of weights\n", info.path,
                     human_count(static_cast<double>(info.parameters)),
                     human_count(static_cast<double>(info.active_parameters)),
                     human_bytes(static_cast<double>(info.weight_bytes)));
}

int run_prefill(const ModelBenchOptions& options) {
  const Model model = load(options);
  const ModelInfo& info = model.info();
  const auto tokens = random_tokens(options.tokens, info.vocab_size);
  Sequence sequence = model.new_sequence();
  Progress progress("prefill", options.tokens * options.bench.repeat, "tokens", progress_by_default());
  int64_t before = 0;
  const auto body = [&] {
    sequence.prefill(tokens, [&](int64_t done) {
      progress.update(before + done);
      return true;
    });
    before += options.tokens;
  };
  // A chunk of the size measured warms caches and threads, and has the system hand out all memory.
  const auto chunk = static_cast<size_t>(options.model.prefill_chunk);
  sequence.prefill(std::span(tokens).first(std::min(tokens.size(), chunk)));
  const Rates rates = measure_rates(
      options.bench.repeat, static_cast<double>(options.tokens), [&] { sequence.clear(); }, body);
  progress.finish();
  const Machine machine = probe_machine(threads_of(options.bench), options.model.pin);
  const double flops_per_token =
      prefill_flops(config_of(options), info, options.tokens) / static_cast<double>(options.tokens);
  const double flops = flops_per_token * rates.median;
  // Each chunk reads every weight once (with experts: those that its tokens chose, nearly all of them).
  const double chunks =
      std::ceil(static_cast<double>(options.tokens) / static_cast<double>(options.model.prefill_chunk));
  const double bytes = static_cast<double>(info.weight_bytes) * chunks / static_cast<double>(options.tokens);
  if (options.bench.json) {
    auto json = common_json("prefill", options, info, rates, machine);
    json["flops_per_token"] = flops_per_token;
    json["bytes_per_token"] = bytes;
    json["flops_per_second"] = flops;
    json["share_of_peak"] = flops / machine.flops_per_second;
    json["share_of_bandwidth"] = bytes * rates.median / machine.read_bytes_per_second;
    write_json_line(json);
    return 0;
  }
  write_out(model_line(info) + describe(machine) + "\n" + speed_line("prefill", rates, info));
  write_out(
      fmt::format("          {} tokens, {} FLOP/token: {:.1f} GFLOP/s, {} of the machine's multiply-adds\n",
                  with_commas(options.tokens), human_count(flops_per_token), flops / 1e9,
                  percent(flops / machine.flops_per_second)));
  return 0;
}

// Repeats of one measurement of decode. A shared host's memory changes its speed within seconds, so reading
// is measured before and after each repeat by as many threads, and the share is that of the repeat's own
// time.
struct DecodeRates {
  Rates tokens;  // per second
  Rates share;   // of reading
  Rates reading;
};
DecodeRates measure_decode(const ModelBenchOptions& options, const Sequence& deep,
                           std::span<const int32_t> tokens, double bytes_per_token, ThreadPool& pool) {
  ReadProbe probe(pool);
  std::vector<double> rates, shares, readings;
  double before = probe.measure();
  const auto count = static_cast<double>(options.tokens);
  for (int i = 0; i <= options.bench.repeat; ++i) {
    Sequence sequence = deep.copy();
    const Stopwatch watch;
    for (const int32_t token : tokens) sequence.decode(token);
    const double rate = count / watch.seconds();
    const double after = probe.measure();
    if (i > 0) {  // the first warms caches and threads
      rates.push_back(rate);
      readings.push_back((before + after) / 2);
      shares.push_back(rate * bytes_per_token / readings.back());
    }
    before = after;
  }
  return {rates_of(std::move(rates)), rates_of(std::move(shares)), rates_of(std::move(readings))};
}

int run_decode(const ModelBenchOptions& options) {
  const Model model = load(options);
  const ModelInfo& info = model.info();
  check(options.depth + options.tokens <= info.max_length,
        "--depth {} and --tokens {}: the model takes {} tokens", options.depth, options.tokens,
        info.max_length);
  const auto past = random_tokens(options.depth, info.vocab_size);
  Sequence deep = model.new_sequence();
  {
    Progress progress("reaching the depth", options.depth, "tokens", progress_by_default());
    deep.prefill(past, [&](int64_t done) {
      progress.update(done);
      return true;
    });
  }
  const double bytes =
      decode_bytes(info, static_cast<double>(options.depth) + static_cast<double>(options.tokens + 1) / 2);
  ThreadPool pool(threads_of(options.bench), options.model.pin);
  const auto tokens = random_tokens(options.tokens, info.vocab_size);
  const DecodeRates rates = measure_decode(options, deep, tokens, bytes, pool);
  const Machine machine{pool.size(), rates.reading.median, measure_peak_flops(pool)};
  if (options.bench.json) {
    auto json = common_json("decode", options, info, rates.tokens, machine);
    json["depth"] = options.depth;
    json["bytes_per_token"] = bytes;
    json["share_of_bandwidth"] = rates.share.median;
    json["share_of_bandwidth_range"] = to_json(rates.share);
    write_json_line(json);
    return 0;
  }
  write_out(model_line(info) + describe(machine) + "\n" + speed_line("decode", rates.tokens, info));
  write_out(
      fmt::format("          {} tokens after {}, {} moved per token: {:.1f} GB/s, {} of reading memory "
                  "beside it ({} to {})\n",
                  with_commas(options.tokens), with_commas(options.depth), human_bytes(bytes),
                  bytes * rates.tokens.median / 1e9, percent(rates.share.median), percent(rates.share.low),
                  percent(rates.share.high)));
  return 0;
}

void add_model_bench_options(const App& app, ModelBenchOptions& options) {
  app.add_option("MODEL", options.model.path, "Hugging Face directory or GGUF file of a Kimi Linear model");
  app.add_option("--config", options.config,
                 "instead of MODEL: random weights in the shape of this config.json")
      .type_name("FILE");
  app.add_option("--tokens", options.tokens, "tokens to measure over")
      .type_name("N")
      .check(in_range(1, 0x1p31 - 1, "a whole number from 1"))
      .capture_default_str();
  add_bench_options(app, options.bench);
  add_threads_option(app, options.bench.threads);
  app.add_option("--prefill-chunk", options.model.prefill_chunk, "prompt tokens computed at once")
      .type_name("N")
      .check(at_least_one())
      .capture_default_str()
      .group("Engine");
  add_cache_options(app, options.model);
}

}  // namespace

Command add_bench_prefill(const App& parent) {
  const auto options = std::make_shared<ModelBenchOptions>();
  options->tokens = 1024;
  options->bench.repeat = 3;
  const App app = parent.add_subcommand("prefill", "reading a prompt");
  app.footer(kPrefillFooter);
  add_model_bench_options(app, *options);
  return {app, [options] { return run_prefill(*options); }};
}

Command add_bench_decode(const App& parent) {
  const auto options = std::make_shared<ModelBenchOptions>();
  options->tokens = 64;
  const App app = parent.add_subcommand("decode", "generating, one token at a time");
  app.footer(kDecodeFooter);
  add_model_bench_options(app, *options);
  app.add_option("--depth", options->depth, "tokens that came before")
      .type_name("D")
      .check(in_range(0, 0x1p31 - 1, "a whole number from 0"))
      .capture_default_str();
  return {app, [options] { return run_decode(*options); }};
}

}  // namespace kilin::cli
