// SPDX-License-Identifier: Apache-2.0
// What the benchmarks share: their options, repeated timing, what the machine can do.
#pragma once
#include <functional>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "kilin/help.h"

namespace kilin::cli {

struct BenchOptions {
  int threads = 0;
  int repeat = 5;
  bool json = false;
};

void add_bench_options(const App& app, BenchOptions& options);
int threads_of(const BenchOptions& options);  // as given, or the physical cores

// Rates, work per second, of the repeats of one measurement.
struct Rates {
  double median = 0;
  double low = 0;
  double high = 0;
};
Rates rates_of(std::vector<double> values);
// Times body() `repeat` times, prepare() before each not included; `work` is what one body() does.
Rates measure_rates(int repeat, double work, const std::function<void()>& prepare,
                    const std::function<void()>& body);
nlohmann::ordered_json to_json(const Rates& rates);  // [low, high]

// Best rates of this machine, measured now.
struct Machine {
  int threads = 0;
  double read_bytes_per_second = 0;
  double flops_per_second = 0;
};
Machine probe_machine(int threads, bool pin = false);
std::string describe(const Machine& machine);

Command add_bench_prefill(const App& parent);
Command add_bench_decode(const App& parent);
Command add_bench_kda(const App& parent);
Command add_bench_mla(const App& parent);

}  // namespace kilin::cli
