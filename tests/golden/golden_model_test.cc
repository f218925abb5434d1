// SPDX-License-Identifier: Apache-2.0
// Agreement with transformers 5.17.0 (tests/data/reference/README.md): the engine on every instruction set,
// and the double-precision oracle, against logits, hidden states, caches, greedy tokens and window losses.
#include <gtest/gtest.h>

#include <cmath>
#include <complex>
#include <cstdio>
#include <string>

#include "base/cpu.h"
#include "model/blocks.h"
#include "oracle/scalar_ops.h"
#include "support/reference.h"

namespace kilin::testing {
namespace {

// transformers' own float32 differs from float64 by 1.6e-5 in logits of size 20 (reference README): both that
// and our rounding stay well below these.
constexpr double kLogitTolerance = 1e-4;   // absolute
constexpr double kHiddenTolerance = 1e-5;  // relative to the norm of the four positions
constexpr double kStateTolerance = 1e-5;   // relative

struct Case {
  std::string golden;
  bool bundled;
};
const Case kCases[] = {{"tiny_random_t1", false}, {"tiny_random_t130", false}, {"docs_prompt_7", true},
                       {"docs_prompt_65", true},  {"docs_prompt_300", true},   {"docs_prompt_chat", true}};

std::string directory(const Case& c) { return c.bundled ? bundled_model() : reference_path("tiny-random"); }

template <class Rows>
void expect_tail(const Rows& tail, const std::vector<float>& golden, int64_t width, double tolerance,
                 const std::string& what) {
  const std::vector<float> ours(tail.end() - static_cast<std::ptrdiff_t>(golden.size()), tail.end());
  ASSERT_EQ(golden.size() % static_cast<size_t>(width), 0u);
  EXPECT_TRUE(close(ours, golden, tolerance)) << what;
}

using Seen = std::vector<std::pair<std::string, std::vector<float>>>;

void expect_hidden(const Seen& seen, const Golden& golden, int64_t width) {
  for (const auto& [name, values] : seen) {
    expect_tail(values, golden.floats("hidden." + name), width, kHiddenTolerance, name);
  }
}

std::string golden_name(std::string_view what, int layer) {
  return what == "layer" ? "layer_" + std::to_string(layer + 1) : std::string(what);
}

void expect_logits(const std::vector<float>& logits, const Golden& golden) {
  const auto expected = golden.floats(golden.contains("logits") ? "logits" : "logits_last16");
  const std::vector<float> ours(logits.end() - static_cast<std::ptrdiff_t>(expected.size()), logits.end());
  EXPECT_LT(largest_difference(ours, expected), kLogitTolerance);
}

class GoldenModel : public ::testing::TestWithParam<std::tuple<Isa, Case>> {
 protected:
  void SetUp() override { set_isa(std::get<0>(GetParam())); }
  void TearDown() override { set_isa(supported_isas().back()); }
  const Case& golden_case() const { return std::get<1>(GetParam()); }
};

TEST_P(GoldenModel, logits_and_hidden_states_after_every_layer_agree) {
  const Golden golden(golden_case().golden);
  Engine engine(load_model(directory(golden_case())), {2, Dtype::kF32});
  Seen seen;
  engine.set_observer([&](std::string_view what, int layer, const EngineTensor& x) {
    seen.emplace_back(golden_name(what, layer), std::vector<float>(x.data, x.data + x.rows * x.width));
  });
  const auto logits = run(engine, engine.cache().acquire(), 0, golden.ids("input_ids"));
  expect_logits(logits, golden);
  EXPECT_EQ(seen.size(), static_cast<size_t>(engine.config().layer_count()) + 2);
  expect_hidden(seen, golden, engine.config().hidden);
  if (golden.contains("argmax_all")) {
    const auto expected = golden.ids("argmax_all");
    const auto vocab = static_cast<size_t>(engine.config().vocab_size);
    for (size_t t = 0; t < expected.size(); ++t) {
      const auto row = logits.begin() + static_cast<std::ptrdiff_t>(t * vocab);
      EXPECT_EQ(std::max_element(row, row + static_cast<std::ptrdiff_t>(vocab)) - row, expected[t])
          << "position " << t;
    }
  }
}

// The default cache rounds latents to float16, by at most 2^-11 of each: that moves scores and values of each
// MLA layer by no more than 2^-11 of their norm (kernels/mla/mla_test.cc), errors of layers being
// independent.
TEST_P(GoldenModel, a_half_precision_cache_moves_logits_by_its_rounding) {
  const Golden golden(golden_case().golden);
  Engine engine(load_model(directory(golden_case())), {2, Dtype::kF16});
  const auto logits = run(engine, engine.cache().acquire(), 0, golden.ids("input_ids"));
  const auto expected = golden.floats(golden.contains("logits") ? "logits" : "logits_last16");
  const std::vector<float> ours(logits.end() - static_cast<std::ptrdiff_t>(expected.size()), logits.end());
  const double layers = static_cast<double>(engine.config().count(LayerKind::kMla));
  const double error = relative_error(ours, expected);
  EXPECT_LT(error, std::sqrt(layers) * 0x1p-11);
  RecordProperty("relative_error", std::to_string(error));
}

TEST_P(GoldenModel, greedy_continuation_is_identical) {
  const Golden golden(golden_case().golden);
  if (!golden.contains("greedy_ids")) return;  // tiny_random_t1 has none
  Engine engine(load_model(directory(golden_case())), {2, Dtype::kF32});
  const int32_t slot = engine.cache().acquire();
  auto ids = golden.ids("input_ids");
  auto logits = run(engine, slot, 0, ids, false);
  std::vector<int32_t> greedy;
  const size_t count = golden.ids("greedy_ids").size();
  for (auto past = static_cast<int64_t>(ids.size()); greedy.size() < count; ++past) {
    greedy.push_back(static_cast<int32_t>(std::max_element(logits.begin(), logits.end()) - logits.begin()));
    logits = run(engine, slot, past, std::span(&greedy.back(), 1));
  }
  EXPECT_EQ(greedy, golden.ids("greedy_ids"));
}

TEST_P(GoldenModel, caches_after_the_prompt_agree) {
  const Golden golden(golden_case().golden);
  if (!golden.contains("state.layer_1.recurrent")) return;  // three of the files hold caches
  Engine engine(load_model(directory(golden_case())), {2, Dtype::kF32});
  const int32_t slot = engine.cache().acquire();
  const auto ids = golden.ids("input_ids");
  run(engine, slot, 0, ids);
  const Config& c = engine.config();
  const int64_t K = c.linear.key_dim, V = c.linear.value_dim, qk = c.linear.heads * K;
  for (int layer = 0; layer < static_cast<int>(c.layer_count()); ++layer) {
    const std::string prefix = "state.layer_" + std::to_string(layer + 1) + ".";
    if (c.layers[static_cast<size_t>(layer)] == LayerKind::kMla) {
      const auto latent = golden.floats(prefix + "mla_latent"),
                 shared = golden.floats(prefix + "mla_rope_part");
      std::vector<float> our_latent, our_shared;
      for (int64_t t = 0; t < static_cast<int64_t>(ids.size()); ++t) {
        std::vector<float> row(static_cast<size_t>(engine.cache().latent_width()));
        engine.cache().load_latent(layer, slot, t, row.data());
        our_latent.insert(our_latent.end(), row.begin(), row.begin() + c.mla.latent);
        our_shared.insert(our_shared.end(), row.begin() + c.mla.latent, row.end());
      }
      EXPECT_TRUE(close(our_latent, latent, kStateTolerance)) << prefix;
      EXPECT_TRUE(close(our_shared, shared, kStateTolerance)) << prefix;
      continue;
    }
    const auto recurrent = golden.floats(prefix + "recurrent"), conv = golden.floats(prefix + "conv");
    const float* state = engine.cache().state(layer) + slot * engine.cache().state_stride();
    std::vector<float> transposed(recurrent.size());  // ours is [head][V][K], theirs [head][K][V]
    for (int64_t h = 0; h < c.linear.value_heads; ++h) {
      for (int64_t i = 0; i < V * K; ++i) {
        transposed[static_cast<size_t>(h * K * V + i % K * V + i / K)] = state[h * V * K + i];
      }
    }
    EXPECT_TRUE(close(transposed, recurrent, kStateTolerance)) << prefix;
    // theirs [q, k, v channels][4 newest inputs], ours the 3 newest, [time][channel] for each of q, k, v
    std::vector<float> ours, theirs;
    for (int64_t channel = 0; channel < 3 * qk; ++channel) {
      const ConvStream streams[] = {ConvStream::kQuery, ConvStream::kKey, ConvStream::kValue};
      const float* past =
          engine.cache().conv(layer, streams[channel / qk]) + slot * engine.cache().conv_stride();
      for (int64_t i = 0; i < 3; ++i) {
        ours.push_back(past[i * qk + channel % qk]);
        theirs.push_back(conv[static_cast<size_t>(channel * 4 + 1 + i)]);
      }
    }
    EXPECT_TRUE(close(ours, theirs, kStateTolerance)) << prefix;
  }
}

std::string case_name(const ::testing::TestParamInfo<std::tuple<Isa, Case>>& test) {
  return std::string(isa_name(std::get<0>(test.param))) + "_" + std::get<1>(test.param).golden;
}
INSTANTIATE_TEST_SUITE_P(IsaFile, GoldenModel,
                         ::testing::Combine(::testing::ValuesIn(supported_isas().begin(),
                                                                supported_isas().end()),
                                            ::testing::ValuesIn(kCases)),
                         case_name);

// Perplexity over the golden windows; each window's loss within `tolerance` of transformers'.
double expect_windows(Dtype cache_type, double tolerance) {
  const Golden golden("docs_valid_perplexity_64x512");
  const auto ids = golden.ids("input_ids");
  const auto expected = golden.doubles("window_nll");
  Engine engine(load_model(bundled_model()), {2, cache_type});
  const int32_t slot = engine.cache().acquire();
  const auto vocab = static_cast<size_t>(engine.config().vocab_size);
  double total = 0, golden_total = 0;
  for (size_t w = 0; w < expected.size(); ++w) {
    engine.cache().clear(slot);
    const std::span<const int32_t> window(ids.data() + w * 512, 512);
    const auto logits = run(engine, slot, 0, window);
    double nll = 0;
    for (size_t t = 0; t + 1 < 512; ++t) {
      const float* row = logits.data() + t * vocab;
      const double top = *std::max_element(row, row + vocab);
      double sum = 0;
      for (size_t v = 0; v < vocab; ++v) sum += std::exp(row[v] - top);
      nll += top + std::log(sum) - row[static_cast<size_t>(window[t + 1])];
    }
    EXPECT_NEAR(nll, expected[w], tolerance * expected[w]) << "window " << w;
    total += nll;
    golden_total += expected[w];
  }
  EXPECT_NEAR(std::exp(total / 32704), std::exp(golden_total / 32704), 0.001 * 10.15);
  return std::exp(total / 32704);
}

TEST(GoldenPerplexity, every_window_of_valid_txt_agrees_with_either_cache) {
  const double exact = expect_windows(Dtype::kF32, 1e-4);
  // A token's loss moves by the error of its logits, 2^-11 of them, a window's by less: signs differ.
  const double half = expect_windows(Dtype::kF16, 2e-4);
  std::printf("perplexity: float32 cache %.6f, float16 cache %.6f, difference %+.2e\n", exact, half,
              half - exact);
  EXPECT_NEAR(half, exact, 1e-3);
}

// The oracle shares blocks.h with the engine; these anchor both to code that nobody here wrote.
class GoldenOracle : public ::testing::TestWithParam<Case> {};

template <class T>
ModelWeights<Matrix<T>> oracle_weights(const LoadedModel& model) {
  ModelWeights<Matrix<T>> weights(model.config());
  size_t i = 0;
  visit_parameters(weights, model.config(),
                   [&](const Parameter& p, Matrix<T>& w) { w = widen<T>(p, model.table()[i++].view); });
  return weights;
}

struct WholeBatch {
  explicit WholeBatch(std::vector<int32_t> tokens)
      : ids(std::move(tokens)), cu{0, static_cast<int32_t>(ids.size())} {
    for (int32_t i = 0; i < cu[1]; ++i) wanted.push_back(i);
  }
  Batch batch() const { return {ids, cu, slots, past, wanted}; }
  std::vector<int32_t> ids;
  std::array<int32_t, 2> cu;
  std::array<int32_t, 1> slots{0};
  std::array<int64_t, 1> past{0};
  std::vector<int32_t> wanted;
};

TEST_P(GoldenOracle, logits_and_hidden_states_agree) {
  const Golden golden(GetParam().golden);
  const LoadedModel model = load_model(directory(GetParam()));
  const auto weights = oracle_weights<double>(model);
  ScalarOps<double> ops(model.config());
  Seen seen;
  ops.observer = [&](std::string_view what, int layer, const Matrix<double>& x) {
    seen.emplace_back(golden_name(what, layer), std::vector<float>(x.v.begin(), x.v.end()));
  };
  const WholeBatch input(golden.ids("input_ids"));
  ops.begin(input.batch());
  const auto logits = model_forward(ops, model.config(), weights);
  expect_logits(std::vector<float>(logits.v.begin(), logits.v.end()), golden);
  expect_hidden(seen, golden, model.config().hidden);
}

INSTANTIATE_TEST_SUITE_P(File, GoldenOracle, ::testing::Values(kCases[0], kCases[1], kCases[2], kCases[3]),
                         [](const auto& test) { return test.param.golden; });

// Complex step: f(w + i h) has the derivative in its imaginary part, exact to rounding for h = 1e-30.
TEST(GoldenGradients, complex_step_of_the_oracle_agrees_with_transformers_autograd) {
  using C = std::complex<double>;
  constexpr double kStep = 1e-30;
  const Golden golden("tiny_random_gradients");
  const LoadedModel model = load_model(reference_path("tiny-random"));
  auto weights = oracle_weights<C>(model);
  const WholeBatch input(golden.ids("input_ids"));
  const auto loss = [&] {
    ScalarOps<C> ops(model.config());
    ops.begin(input.batch());
    const auto logits = model_forward(ops, model.config(), weights);
    C sum = 0;
    for (int64_t t = 0; t + 1 < logits.rows; ++t) {
      C total = 0;
      for (int64_t v = 0; v < logits.width; ++v) total += std::exp(logits.row(t)[v]);
      sum += std::log(total) - logits.row(t)[input.ids[static_cast<size_t>(t + 1)]];
    }
    return sum / static_cast<double>(logits.rows - 1);
  };
  EXPECT_NEAR(std::real(loss()), golden.floats("loss")[0], 2e-6);
  const std::string attention = "model.layers.1.self_attn.";
  const std::vector<std::string> checked{attention + "A_log",
                                         attention + "dt_bias",
                                         attention + "k_conv1d.weight",
                                         attention + "f_a_proj.weight",
                                         attention + "b_proj.weight",
                                         attention + "o_norm.weight",
                                         "model.layers.3.self_attn.kv_b_proj.weight",
                                         "model.layers.2.block_sparse_moe.gate.weight"};
  visit_parameters(weights, model.config(), [&](const Parameter& p, Matrix<C>& w) {
    if (std::find(checked.begin(), checked.end(), p.name) == checked.end()) return;
    const auto expected = golden.floats("grad." + p.name);
    const auto largest =
        static_cast<size_t>(std::max_element(expected.begin(), expected.end(),
                                             [](float a, float b) { return std::abs(a) < std::abs(b); }) -
                            expected.begin());
    C& entry = w.v[largest];
    entry += C(0, kStep);
    const double gradient = std::imag(loss()) / kStep;
    entry = std::real(entry);
    EXPECT_NEAR(gradient, expected[largest], 1e-4 * std::abs(expected[largest]))
        << p.name << " entry " << largest;
  });
}

TEST(GoldenRouter, chosen_experts_and_weights_agree) {
  const Golden golden("tiny_random_modules_t130");
  const LoadedModel model = load_model(reference_path("tiny-random"));
  const MoeConfig& m = model.config().moe;
  RouterParams params;
  params.experts = static_cast<int>(m.experts);
  params.top_k = static_cast<int>(m.top_k);
  params.scale = static_cast<float>(m.scale);
  for (size_t layer = 1; layer < 4; ++layer) {
    const std::string prefix = "layer_" + std::to_string(layer + 1) + ".router.";
    const auto logits = golden.floats(prefix + "logits"), weights = golden.floats(prefix + "weights");
    const auto experts = golden.ids(prefix + "experts");
    std::vector<int32_t> ids(experts.size());
    std::vector<float> ours(experts.size());
    route(params, 130, logits.data(), model.weights().layers[layer].moe.router_bias.vector, ids.data(),
          ours.data());
    for (size_t t = 0; t < experts.size(); t += 2) {  // the file has the chosen ones in rising order
      const size_t low = ids[t] < ids[t + 1] ? t : t + 1;
      const size_t high = low == t ? t + 1 : t;
      EXPECT_EQ(ids[low], experts[t]);
      EXPECT_EQ(ids[high], experts[t + 1]);
      EXPECT_NEAR(ours[low], weights[t], 1e-6);
      EXPECT_NEAR(ours[high], weights[t + 1], 1e-6);
    }
  }
}

}  // namespace
}  // namespace kilin::testing
