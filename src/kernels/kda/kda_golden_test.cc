// SPDX-License-Identifier: Apache-2.0
// The kernels and their oracle against golden files made in float64 by an independent implementation
// (tests/data/reference/README.md): layouts [B][T][H][width], states [B][H][K][V].
#include <gtest/gtest.h>

#include <fstream>
#include <map>
#include <nlohmann/json.hpp>

#include "kernels/kda/kda_backward_test_util.h"

namespace kilin {
namespace {

using namespace kda_testing;

constexpr int kHeads = 2;
constexpr int kDim = 64;

struct Golden {
  std::map<std::string, std::vector<float>> tensors;
  int batch = 0;
  int tokens = 0;
  const std::vector<float>& operator[](const std::string& name) const { return tensors.at(name); }
};

Golden read_golden(const std::string& name) {
  std::ifstream file(KILIN_SOURCE_DIR "/tests/data/reference/goldens/" + name + ".safetensors",
                     std::ios::binary);
  uint64_t header_size = 0;
  file.read(reinterpret_cast<char*>(&header_size), sizeof header_size);
  if (!file || header_size > 1'000'000) throw std::runtime_error("no golden file " + name);
  std::string header(header_size, ' ');
  file.read(header.data(), static_cast<std::streamsize>(header_size));
  Golden golden;
  const auto json = nlohmann::json::parse(header);
  for (const auto& [tensor, entry] : json.items()) {
    if (tensor == "__metadata__") continue;
    const auto begin = entry["data_offsets"][0].get<size_t>();
    auto& values = golden.tensors[tensor];
    values.resize((entry["data_offsets"][1].get<size_t>() - begin) / sizeof(float));
    file.seekg(static_cast<std::streamoff>(8 + header_size + begin));
    file.read(reinterpret_cast<char*>(values.data()),
              static_cast<std::streamsize>(values.size() * sizeof(float)));
  }
  golden.batch = json["q"]["shape"][0].get<int>();
  golden.tokens = json["q"]["shape"][1].get<int>();
  return golden;
}

// [..][rows][columns] to [..][columns][rows]
template <class T>
std::vector<T> transposed(const std::vector<T>& from, int64_t rows, int64_t columns) {
  std::vector<T> to(from.size());
  for (int64_t i = 0; i < static_cast<int64_t>(from.size()); ++i) {
    const int64_t matrix = i / (rows * columns) * (rows * columns);
    const int64_t within = i % (rows * columns);
    to[static_cast<size_t>(matrix + within % columns * rows + within / columns)] =
        from[static_cast<size_t>(i)];
  }
  return to;
}

Problem golden_problem(const Golden& golden, bool bounded, bool zero_state) {
  Problem problem({.heads = kHeads,
                   .value_heads = kHeads,
                   .key_dim = kDim,
                   .value_dim = kDim,
                   .lengths = std::vector<int>(static_cast<size_t>(golden.batch), golden.tokens),
                   .gate = bounded ? KdaGate::kBounded : KdaGate::kSoftplus,
                   .beta_is_logit = false});
  std::iota(problem.slots.begin(), problem.slots.end(), 0);
  problem.q = golden["q"];
  problem.k = golden["k"];
  problem.v = golden["v"];
  problem.gate = golden["g_raw"];
  problem.beta = golden["beta"];
  problem.a_log = golden["A_log"];
  problem.dt_bias = golden["dt_bias"];
  problem.state = transposed(golden["initial_state"], kDim, kDim);
  if (zero_state) std::fill(problem.state.begin(), problem.state.end(), 0.0f);
  return problem;
}

TEST(KdaGolden, KernelsGiveTheGoldenOutputsAndStates) {
  for (const char* gate : {"softplus", "lowerbound"}) {
    for (int tokens : {1, 65, 150}) {
      const std::string name = std::string("kda_") + gate + "_t" + std::to_string(tokens);
      const Golden golden = read_golden(name);
      for (bool zero_state : {false, true}) {
        const Problem problem = golden_problem(golden, name.find("lower") != std::string::npos, zero_state);
        const std::string suffix = zero_state ? "_zero_state" : "";
        const auto state = transposed(golden["final_state" + suffix], kDim, kDim);
        for_each_isa([&](const std::string& isa) {
          for (KdaFunction function : {&kda_recurrent, &kda_chunk, &kda_forward}) {
            const Result result = run(problem, function, 2);
            EXPECT_LT(relative_error(result.out, golden["o" + suffix]), 1e-5) << name << suffix << " " << isa;
            EXPECT_LT(relative_error(result.state, state), 1e-5) << name << suffix << " " << isa;
          }
        });
      }
    }
  }
}

// Imaginary parts of o and of the final state after a step of 1e-30 i in one input, contracted with the
// golden output gradients: the derivative, exact to rounding.
TEST(KdaGolden, ComplexStepOfTheOracleGivesTheGoldenGradients) {
  using Complex = std::complex<double>;
  const Golden golden = read_golden("kda_softplus_t65");
  Problem problem = golden_problem(golden, false, false);
  const int64_t row = kHeads * kDim;
  const int head = 1;
  const auto slice = [&](const std::string& name, int64_t stride, int64_t column, int64_t width) {
    std::vector<Complex> to;
    for (int64_t t = 0; t < golden.tokens; ++t) {
      const float* from = golden[name].data() + t * stride + column;
      to.insert(to.end(), from, from + width);
    }
    return to;
  };
  const auto d_out = slice("d_o", row, head * kDim, kDim);
  const auto all_d_state = transposed(golden["d_final_state"], kDim, kDim);
  const auto derivative = [&](const std::string& input, size_t index) {
    std::map<std::string, std::vector<Complex>> x;
    for (const char* name : {"q", "k", "v", "g_raw"}) x[name] = slice(name, row, head * kDim, kDim);
    x["beta"] = slice("beta", kHeads, head, 1);
    x["A_log"] = {Complex(golden["A_log"][head])};
    x["dt_bias"].assign(golden["dt_bias"].begin() + head * kDim,
                        golden["dt_bias"].begin() + (head + 1) * kDim);
    const auto state_begin = problem.state.begin() + head * kDim * kDim;
    x["state"].assign(state_begin, state_begin + kDim * kDim);
    x[input][index] += Complex(0.0, 1e-30);
    std::vector<Complex> out(d_out.size());
    kda_reference<Complex>(problem.params(), golden.tokens, x["q"].data(), x["k"].data(), x["v"].data(),
                           x["g_raw"].data(), x["beta"].data(), x["A_log"][0], x["dt_bias"].data(),
                           x["state"].data(), out.data());
    double sum = 0.0;
    for (size_t i = 0; i < out.size(); ++i) sum += std::imag(out[i]) * std::real(d_out[i]);
    for (size_t i = 0; i < x["state"].size(); ++i) {
      sum += std::imag(x["state"][i]) * static_cast<double>(all_d_state[head * kDim * kDim + i]);
    }
    return sum * 1e30;
  };
  std::map<std::string, std::vector<double>> found;
  std::map<std::string, std::vector<double>> expected;
  for (const char* name : {"q", "k", "v", "g_raw"}) {
    for (const auto& [t, channel] : {std::pair{0, 0}, std::pair{31, 17}, std::pair{64, 63}}) {
      found[name].push_back(derivative(name, static_cast<size_t>(int64_t{t} * kDim + channel)));
      const auto index = static_cast<size_t>(int64_t{t} * row + head * kDim + channel);
      expected[name].push_back(static_cast<double>(golden[std::string("grad_") + name][index]));
    }
  }
  found["beta"] = {derivative("beta", 40)};
  expected["beta"] = {static_cast<double>(golden["grad_beta"][40 * kHeads + head])};
  found["A_log"] = {derivative("A_log", 0)};
  expected["A_log"] = {static_cast<double>(golden["grad_A_log"][head])};
  found["dt_bias"] = {derivative("dt_bias", 5)};
  expected["dt_bias"] = {static_cast<double>(golden["grad_dt_bias"][head * kDim + 5])};
  for (const auto& [name, values] : found) EXPECT_LT(relative_error(values, expected[name]), 1e-6) << name;
}

TEST(KdaGolden, KernelsGiveTheGoldenGradients) {
  for (const char* gate : {"softplus", "lowerbound"}) {
    for (int tokens : {1, 65, 150}) {
      const std::string name = std::string("kda_") + gate + "_t" + std::to_string(tokens);
      const Golden golden = read_golden(name);
      BackwardProblem problem(golden_problem(golden, name.find("lower") != std::string::npos, false));
      problem.d_out = golden["d_o"];
      problem.d_state = transposed(golden["d_final_state"], kDim, kDim);
      for_each_isa([&](const std::string& isa) {
        const Gradients<float> found = run_backward(problem, 2);
        const auto expect = [&](const char* of, const std::vector<float>& d,
                                const std::vector<float>& expected) {
          EXPECT_LT(relative_error(d, expected), 1e-5) << name << " " << of << " " << isa;
        };
        expect("q", found.q, golden["grad_q"]);
        expect("k", found.k, golden["grad_k"]);
        expect("v", found.v, golden["grad_v"]);
        expect("gate", found.gate, golden["grad_g_raw"]);
        expect("beta", found.beta, golden["grad_beta"]);
        expect("a_log", found.a_log, golden["grad_A_log"]);
        expect("dt_bias", found.dt_bias, golden["grad_dt_bias"]);
        expect("state", found.state, transposed(golden["grad_initial_state"], kDim, kDim));
      });
    }
  }
}

}  // namespace
}  // namespace kilin
