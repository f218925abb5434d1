// SPDX-License-Identifier: Apache-2.0
// kilin bench: how fast the engine is, and how far from what the machine can do.
#include "kilin/bench.h"

#include <fmt/format.h>

#include <algorithm>
#include <memory>
#include <utility>

#include "base/cpu.h"
#include "base/thread_pool.h"
#include "kilin/commands.h"
#include "kilin/common.h"
#include "kilin/format.h"
#include "kilin/machine_probe.h"
#include "kilin/output.h"

namespace kilin::cli {
namespace {

constexpr const char* kFooter =
    R"(Every benchmark also measures what this machine can do (reading 1 GiB of memory,
multiply-adds in registers, with the same threads) and prints its share of it.
Rates are medians over the repeats, with the slowest and the fastest.

Examples:
  kilin bench prefill models/kilin-docs-10m --tokens 2048
  kilin bench decode models/kilin-docs-10m --depth 4096
  kilin bench decode --config config.json --threads 2 --json
  kilin bench kda
  kilin bench mla --depth 16384
  kilin bench bandwidth)";

int run_bandwidth(const BenchOptions& options) {
  const Machine machine = probe_machine(threads_of(options));
  if (options.json) {
    nlohmann::ordered_json json;
    json["bench"] = "bandwidth";
    json["threads"] = machine.threads;
    json["isa"] = isa_name(active_isa());
    json["bandwidth_bytes_per_second"] = machine.read_bytes_per_second;
    json["peak_flops_per_second"] = machine.flops_per_second;
    write_json_line(json);
  } else {
    write_out(describe(machine) + "\n");
  }
  return 0;
}

Command add_bench_bandwidth(const App& parent) {
  const auto options = std::make_shared<BenchOptions>();
  const App app = parent.add_subcommand("bandwidth", "what this machine can do: memory reads, multiply-adds");
  add_threads_option(app, options->threads);
  app.add_flag("--json", options->json, "print one JSON object");
  return {app, [options] { return run_bandwidth(*options); }};
}

}  // namespace

void add_bench_options(const App& app, BenchOptions& options) {
  app.add_option("--repeat", options.repeat, "measure this many times")
      .type_name("R")
      .check(in_range(1, 10000, "a whole number from 1 to 10000"))
      .capture_default_str();
  app.add_flag("--json", options.json, "print one JSON object");
}

int threads_of(const BenchOptions& options) {
  return options.threads > 0 ? options.threads : physical_cores();
}

Rates measure_rates(int repeat, double work, const std::function<void()>& prepare,
                    const std::function<void()>& body) {
  std::vector<double> rates;
  for (int i = 0; i < repeat; ++i) {
    prepare();
    const Stopwatch watch;
    body();
    rates.push_back(work / watch.seconds());
  }
  return rates_of(std::move(rates));
}

Rates rates_of(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  const size_t half = values.size() / 2;
  const double median = values.size() % 2 == 1 ? values[half] : (values[half - 1] + values[half]) / 2;
  return {median, values.front(), values.back()};
}

nlohmann::ordered_json to_json(const Rates& rates) { return {rates.low, rates.high}; }

Machine probe_machine(int threads, bool pin) {
  ThreadPool pool(threads, pin);
  return {threads, measure_read_bandwidth(pool), measure_peak_flops(pool)};
}

std::string describe(const Machine& machine) {
  return fmt::format("machine   reads {:.1f} GB/s, {:.0f} GFLOP/s float32 ({}, {} thread{})",
                     machine.read_bytes_per_second / 1e9, machine.flops_per_second / 1e9,
                     isa_name(active_isa()), machine.threads, machine.threads == 1 ? "" : "s");
}

Command add_bench(const App& parent) {
  const App app = parent.add_subcommand("bench", "measure speed, and the share of what the machine can do");
  app.footer(kFooter);
  app.require_subcommand(1);
  const std::vector<Command> benchmarks{add_bench_prefill(app), add_bench_decode(app), add_bench_kda(app),
                                        add_bench_mla(app), add_bench_bandwidth(app)};
  return {app, [benchmarks] { return run_chosen(benchmarks); }};
}

}  // namespace kilin::cli
