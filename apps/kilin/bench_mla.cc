// SPDX-License-Identifier: Apache-2.0
// kilin bench mla: latent attention alone, over a cache that does not fit any level of the processor's own.
#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <memory>
#include <new>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "base/cpu.h"
#include "base/float16.h"
#include "base/random.h"
#include "base/thread_pool.h"
#include "kernels/mla/mla.h"
#include "kilin/bench.h"
#include "kilin/common.h"
#include "kilin/format.h"
#include "kilin/output.h"

namespace kilin::cli {
namespace {

constexpr const char* kFooter =
    R"(One layer over a cache of --depth random latents, --queries new tokens after it (1:
decode). Few queries: the calls take turns on copies of the cache that are 1 GiB
together, so that each reads memory. bytes: cache rows read. GFLOP/s counts the
multiply-adds of the order that was run, each needed one once.

Examples:
  kilin bench mla --heads 8 --depth 16384
  kilin bench mla --depth 8192 --queries 2048 --cache-type f32 --json)";

constexpr int64_t kPageTokens = 256;
constexpr int64_t kColdQueries = 16;  // up to so many the cache is read from memory

struct MlaBenchOptions {
  BenchOptions bench;
  int heads = 8;
  int nope = 128;
  int rope = 64;
  int value = 128;
  int latent = 512;
  int depth = 16384;
  int queries = 1;
  std::string cache_type = "f16";
  std::string order = "auto";
  std::string activations = "exact";
};

struct Free {
  void operator()(std::byte* p) const { ::operator delete (p, std::align_val_t{64}); }
};
using Bytes = std::unique_ptr<std::byte, Free>;
Bytes allocate(size_t bytes) {
  return Bytes(static_cast<std::byte*>(::operator new (bytes, std::align_val_t{64})));
}

// Weights (bfloat16), queries and copies of a cache, all random.
class Inputs {
 public:
  explicit Inputs(const MlaBenchOptions& options) {
    p_.heads = options.heads;
    p_.nope = options.nope;
    p_.rope = options.rope;
    p_.value = options.value;
    p_.latent = options.latent;
    p_.scale = 1.0f / std::sqrt(static_cast<float>(options.nope + options.rope));
    p_.cache_type = options.cache_type == "f16"    ? Dtype::kF16
                    : options.cache_type == "bf16" ? Dtype::kBF16
                                                   : Dtype::kF32;
    p_.activations = options.activations == "exact" ? Activations::kExact : Activations::kRounded;
    p_.page_tokens = kPageTokens;
    p_.page_stride = p_.latent + p_.rope;
    pack(k_absorb_, p_.latent, p_.nope);
    pack(k_expand_, p_.nope, p_.latent);
    pack(value_up_, p_.value, p_.latent);
    p_.k_absorb = k_absorb_.data();
    p_.k_expand = k_expand_.data();
    p_.value_up = value_up_.data();
    q_.resize(static_cast<size_t>(options.queries * p_.heads * (p_.nope + p_.rope)));
    for (float& x : q_) x = static_cast<float>(random_.normal());
    out_.resize(static_cast<size_t>(options.queries * p_.heads * p_.value));
    p_.q = q_.data();
    p_.out = out_.data();
    p_.sequences = 1;
    add_caches(options);
  }
  Inputs(const Inputs&) = delete;
  Inputs& operator=(const Inputs&) = delete;

  const MlaParams& params() const { return p_; }
  const std::vector<MlaSequence>& copies() const { return copies_; }

 private:
  void pack(std::vector<WeightMatrix>& matrices, int64_t rows, int64_t cols) {
    const double scale = 1.0 / std::sqrt(static_cast<double>(p_.latent));
    std::vector<BFloat16> stored(static_cast<size_t>(rows * cols));
    for (int64_t h = 0; h < p_.heads; ++h) {
      for (BFloat16& x : stored) x = to_bfloat16(static_cast<float>(scale * random_.normal()));
      memory_.push_back(allocate(packed_bytes(Dtype::kBF16, rows, cols)));
      pack_weights(Dtype::kBF16, stored.data(), rows, cols, 0, rows, memory_.back().get());
      matrices.push_back({memory_.back().get(), Dtype::kBF16, rows, cols});
    }
  }

  void add_caches(const MlaBenchOptions& options) {
    const int64_t tokens = int64_t{options.depth} + options.queries;
    const int64_t pages = (tokens + kPageTokens - 1) / kPageTokens;
    const auto page_bytes = static_cast<size_t>(kPageTokens * p_.page_stride) * dtype_size(p_.cache_type);
    const int64_t cache_bytes = pages * static_cast<int64_t>(page_bytes);
    const int64_t copies =
        options.queries > kColdQueries ? 1 : (kProbeCacheBytes + cache_bytes - 1) / cache_bytes;
    std::vector<float> row(static_cast<size_t>(p_.page_stride));
    pointers_.resize(static_cast<size_t>(copies));
    for (int64_t c = 0; c < copies; ++c) {
      auto& pointers = pointers_[static_cast<size_t>(c)];
      for (int64_t i = 0; i < pages; ++i) {
        memory_.push_back(allocate(page_bytes));
        std::byte* page = memory_.back().get();
        pointers.push_back(page);
        if (c > 0) {
          std::memcpy(page, pointers_[0][static_cast<size_t>(i)], page_bytes);
          continue;
        }
        for (int64_t t = 0; t < kPageTokens; ++t) {
          for (float& x : row) x = static_cast<float>(random_.normal());
          mla_store_row(p_.cache_type, p_.page_stride, row.data(),
                        page + static_cast<size_t>(t * p_.page_stride) * dtype_size(p_.cache_type));
        }
      }
      copies_.push_back({0, options.queries, options.depth, pointers.data()});
    }
  }

  static constexpr int64_t kProbeCacheBytes = int64_t{1} << 30;

  Random random_{1};
  MlaParams p_;
  std::vector<Bytes> memory_;
  std::vector<WeightMatrix> k_absorb_, k_expand_, value_up_;
  std::vector<float> q_, out_;
  std::vector<std::vector<const void*>> pointers_;
  std::vector<MlaSequence> copies_;
};

struct Result {
  bool expanded = false;
  Rates calls;       // per second
  double flops = 0;  // of a call
  double bytes = 0;
};

Result measure(const MlaBenchOptions& options, ThreadPool& pool) {
  const Inputs inputs(options);
  const MlaParams& p = inputs.params();
  Result result;
  result.expanded =
      options.order == "expanded" || (options.order == "auto" && options.queries >= mla_expand_threshold(p));
  const auto attend = [&](const MlaSequence& s) {
    if (result.expanded) {
      mla_expanded(p, s, pool);
    } else {
      mla_absorbed(p, s, pool);
    }
  };
  attend(inputs.copies().front());  // warms threads and scratch
  result.calls = measure_rates(
      options.bench.repeat, static_cast<double>(inputs.copies().size()), [] {},
      [&] {
        for (const MlaSequence& s : inputs.copies()) attend(s);
      });
  const MlaSequence& s = inputs.copies().front();
  result.flops = result.expanded ? mla_expanded_flops(p, s) : mla_absorbed_flops(p, s);
  result.bytes = mla_cache_bytes(p, s);
  return result;
}

nlohmann::ordered_json to_json(const Result& result, const MlaBenchOptions& options, const Machine& machine) {
  nlohmann::ordered_json json;
  json["bench"] = "mla";
  json["heads"] = options.heads;
  json["depth"] = options.depth;
  json["queries"] = options.queries;
  json["cache_type"] = options.cache_type;
  json["activations"] = options.activations;
  json["order"] = result.expanded ? "expanded" : "absorbed";
  json["threads"] = machine.threads;
  json["isa"] = isa_name(active_isa());
  json["repeats"] = options.bench.repeat;
  json["ms"] = 1e3 / result.calls.median;
  json["ms_range"] = {1e3 / result.calls.high, 1e3 / result.calls.low};
  json["bytes"] = result.bytes;
  json["bytes_per_second"] = result.bytes * result.calls.median;
  json["share_of_bandwidth"] = result.bytes * result.calls.median / machine.read_bytes_per_second;
  json["flops"] = result.flops;
  json["flops_per_second"] = result.flops * result.calls.median;
  json["share_of_peak"] = result.flops * result.calls.median / machine.flops_per_second;
  json["bandwidth_bytes_per_second"] = machine.read_bytes_per_second;
  json["peak_flops_per_second"] = machine.flops_per_second;
  return json;
}

int run(const MlaBenchOptions& options) {
  ThreadPool pool(threads_of(options.bench));
  const Result result = measure(options, pool);
  const Machine machine = probe_machine(pool.size());
  if (options.bench.json) {
    write_json_line(to_json(result, options, machine));
    return 0;
  }
  const double rate = result.calls.median;
  write_out(describe(machine) + "\n");
  write_out(fmt::format("shape     {} heads, {} queries after {} tokens, cache in {}\n", options.heads,
                        with_commas(options.queries), with_commas(options.depth), options.cache_type));
  write_out(fmt::format("{}  {:.3f} ms (median; {:.3f} to {:.3f})\n",
                        result.expanded ? "expanded" : "absorbed", 1e3 / rate, 1e3 / result.calls.high,
                        1e3 / result.calls.low));
  write_out(fmt::format("          {} of cache: {:.1f} GB/s, {} of reading memory\n",
                        human_bytes(result.bytes), result.bytes * rate / 1e9,
                        percent(result.bytes * rate / machine.read_bytes_per_second)));
  write_out(fmt::format("          {:.1f} GFLOP/s, {} of the machine's multiply-adds\n",
                        result.flops * rate / 1e9, percent(result.flops * rate / machine.flops_per_second)));
  return 0;
}

}  // namespace

Command add_bench_mla(const App& parent) {
  const auto options = std::make_shared<MlaBenchOptions>();
  const App app = parent.add_subcommand("mla", "latent attention alone, over a cache of some depth");
  app.footer(kFooter);
  const auto add = [&](const char* name, int& value, double low, double high, const char* text) {
    app.add_option(name, value, text)
        .type_name("N")
        .check(in_range(low, high, fmt::format("a whole number from {:.0f} to {:.0f}", low, high)))
        .capture_default_str();
  };
  add("--heads", options->heads, 1, 1024, "heads");
  add("--depth", options->depth, 0, 1 << 24, "tokens in the cache");
  add("--queries", options->queries, 1, 1 << 20, "new tokens after them");
  add("--nope", options->nope, 1, 1024, "width of a head's own keys");
  add("--rope", options->rope, 0, 1024, "width of the keys that heads share");
  add("--value", options->value, 1, 1024, "width of a head's values");
  add("--latent", options->latent, 1, 4096, "width of the latent");
  app.add_option("--cache-type", options->cache_type, "f16, bf16 or f32")
      .type_name("TYPE")
      .check(one_of({"f16", "bf16", "f32"}))
      .capture_default_str();
  app.add_option("--order", options->order, "auto (as the engine chooses), absorbed or expanded")
      .type_name("NAME")
      .check(one_of({"auto", "absorbed", "expanded"}))
      .capture_default_str();
  app.add_option("--activations", options->activations,
                 "exact, or rounded to bfloat16 where this machine is faster at it")
      .type_name("HOW")
      .check(one_of({"exact", "rounded"}))
      .capture_default_str();
  add_bench_options(app, options->bench);
  add_threads_option(app, options->bench.threads);
  return {app, [options] { return run(*options); }};
}

}  // namespace kilin::cli
