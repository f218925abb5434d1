// SPDX-License-Identifier: Apache-2.0
// The engine on every type of stored weights, read from GGUF files, against the oracle in double on the same
// weights dequantised; prompts on both sides of the thresholds where matmul() changes its form.
#include <gtest/gtest.h>

#include <cstring>
#include <map>
#include <memory>
#include <nlohmann/json.hpp>

#include "base/cpu.h"
#include "base/random.h"
#include "engine/convert_plan.h"
#include "io/gguf_writer.h"
#include "io/json.h"
#include "io/test_support.h"
#include "model/gguf_config.h"
#include "model/random_values.h"
#include "model/stored_model.h"
#include "model/stored_parameter.h"
#include "oracle/scalar_ops.h"
#include "quant/formats.h"
#include "support/reference.h"

namespace kilin::testing {
namespace {

using Json = nlohmann::json;

constexpr Dtype kTypes[] = {Dtype::kF32,  Dtype::kF16,  Dtype::kBF16, Dtype::kQ8_0,
                            Dtype::kQ5_0, Dtype::kQ4_0, Dtype::kQ4_K, Dtype::kQ6_K};

// || error || / || logits || that is allowed, from that of one product, e, by some 20 products one after the
// other or side by side on the way of a logit, whose errors are independent: sqrt(20) e, doubled. Measured:
// about half of each.
double tolerance(Dtype dtype, Isa isa, Activations activations) {
  // Rounded: steps of max / 127 instead, e = 3.5 / 127 / sqrt(12) = 8e-3; with BF16 weights a rounding to 8
  // significant bits, whose error is 1.6e-3 in the norm.
  if (activations != Activations::kExact && is_quantized(dtype)) return 7e-2;
  if (activations == Activations::kRounded && dtype == Dtype::kBF16) return 1.5e-2;
  // Activations as 16-bit integers in steps of max / 32512 over 32 neighbours. The rounding is uniform, max
  // is 2.2 (normal values) to 3.5 (SwiGLU's products) deviations: e = 3.5 / 32512 / sqrt(12) = 3.1e-5.
  if (is_quantized(dtype)) return 3e-4;
  // AMX: two bfloat16 terms of an activation (and of F16), of which the rest is at most 2^-17 of the value.
  if (isa == Isa::kAmx && dtype != Dtype::kF32) return 5e-5;
  return 5e-6;  // sums in float32, 2^-24 per addition
}

// Rows that fill blocks of 256 wherever the family lets them; latent attention of few columns per head, whose
// kv_b takes the blocks of 32. Every token goes to every expert: no tie between two can turn on a rounding,
// and the experts have as many tokens as the prompt.
Config small_config(std::string& text) {
  Json json = io::parse_json_file(reference_path("tiny-random/config.json"));
  json.merge_patch(
      Json{{"hidden_size", 256},
           {"intermediate_size", 512},
           {"moe_intermediate_size", 256},
           {"num_experts", 3},
           {"num_experts_per_token", 3},
           {"num_hidden_layers", 3},
           {"kv_lora_rank", 256},
           {"qk_nope_head_dim", 32},
           {"qk_rope_head_dim", 16},
           {"v_head_dim", 128},
           {"linear_attn_config", {{"kda_layers", {1, 2}}, {"full_attn_layers", {3}}, {"head_dim", 128}}}});
  text = json.dump();
  return read_config(io::JsonReader(json, "small"), compatibility("transformers"));
}

// n values of about 0.06 as stored bytes; of types that cannot be written as random blocks.
std::vector<std::byte> random_matrix(Dtype dtype, int64_t n, Random& random) {
  std::vector<std::byte> bytes(dtype_bytes(dtype, n));
  if (quant::writable(dtype)) {
    std::vector<float> x(static_cast<size_t>(n));
    for (float& v : x) v = static_cast<float>(0.06 * random.normal());
    quant::quantize(dtype, x.data(), n, bytes.data());
    return bytes;
  }
  for (std::byte& b : bytes) b = static_cast<std::byte>(random.bits());
  const size_t size = dtype_traits(dtype).block_bytes;
  const size_t place = dtype == Dtype::kQ6_K ? 208 : 0;
  const double scale = dtype == Dtype::kQ6_K ? 0.06 / (74 * 18.5) : 0.06 / 9.2;
  for (size_t at = 0; at < bytes.size(); at += size) {
    const Float16 d = to_float16(static_cast<float>(scale * (0.5 + random.uniform())));
    std::memcpy(&bytes[at + place], &d, sizeof(d));
  }
  return bytes;
}

std::vector<std::byte> random_vector(const PlannedTensor& t, const Parameter& p) {
  std::vector<float> x(static_cast<size_t>(element_count(p.shape)));
  random_values(p, 3, 0, static_cast<int64_t>(x.size()), x.data());
  for (float& v : x) v = t.content == Content::kNegativeExp ? -std::exp(v) : v;
  const auto bytes = std::as_bytes(std::span(x));
  return {bytes.begin(), bytes.end()};
}

void write_model(const Config& config, const std::string& text, Dtype dtype, const std::string& path) {
  const std::vector<Parameter> parameters = parameter_table(config);
  std::vector<PlannedTensor> plan = plan_gguf(parameters, config);
  io::GgufWriter writer(path);
  write_gguf_config(config, text, writer);
  for (PlannedTensor& t : plan) {
    const bool matrix = t.role != Role::kVector && t.role != Role::kConv && t.role != Role::kRouter;
    const Dtype fitting = t.shape.back() % dtype_block(dtype) == 0 ? dtype : Dtype::kQ8_0;
    t.dtype = matrix ? fitting : Dtype::kF32;
    writer.add_tensor(t.name, t.dtype, t.shape);
  }
  Random random(11);
  for (const PlannedTensor& t : plan) {
    const auto bytes = t.role == Role::kVector ? random_vector(t, parameters[t.parameters.front()])
                                               : random_matrix(t.dtype, element_count(t.shape), random);
    writer.write(bytes.data(), bytes.size());
  }
  writer.commit();
}

// Each parameter as the conversions read it, in double.
ModelWeights<Matrix<double>> exact_weights(const io::Checkpoint& checkpoint, const Config& config) {
  ModelWeights<Matrix<double>> weights(config);
  visit_parameters(weights, config, [&](const Parameter& p, Matrix<double>& w) {
    const auto stored = StoredParameter::find(checkpoint, p, config);
    std::vector<float> x(static_cast<size_t>(stored.elements()));
    stored.read(0, stored.elements(), x.data());
    const int64_t rows = p.role == Role::kVector ? 1 : p.shape[0];
    w = Matrix<double>(rows, stored.elements() / rows);
    std::copy(x.begin(), x.end(), w.v.begin());
  });
  return weights;
}

std::vector<int32_t> prompt(int64_t n) {
  Random random(static_cast<uint64_t>(n));
  std::vector<int32_t> ids(static_cast<size_t>(n));
  for (int32_t& id : ids) id = static_cast<int32_t>(random.below(512));
  return ids;
}

// From one: dot products; 9: AMX of bfloat16; 40: AMX of every type; 300: beyond a block of AMX's tokens.
constexpr int64_t kPrompts[] = {1, 9, 40, 300};

// One file per type and what the oracle says of it, made once for all instruction sets.
struct Model {
  io::TemporaryDirectory directory;
  std::string path, text;
  Config config = small_config(text);
  std::map<int64_t, std::vector<float>> logits;  // of all tokens of prompt(length)

  explicit Model(Dtype dtype) : path(directory.file("model.gguf")) {
    write_model(config, text, dtype, path);
    const auto checkpoint = io::Checkpoint::open(path);
    const auto weights = exact_weights(checkpoint, config);
    for (const int64_t length : kPrompts) {
      const auto ids = prompt(length);
      const std::vector<int32_t> cu{0, static_cast<int32_t>(length)}, slots{0};
      const std::vector<int64_t> past{0};
      std::vector<int32_t> wanted(ids.size());
      std::iota(wanted.begin(), wanted.end(), 0);
      ScalarOps<double> oracle(config);
      oracle.begin({ids, cu, slots, past, wanted});
      const auto exact = model_forward(oracle, config, weights);
      logits[length].assign(exact.v.begin(), exact.v.end());
    }
  }
};

const Model& model_of(Dtype dtype) {
  static std::map<Dtype, std::unique_ptr<Model>> models;
  auto& model = models[dtype];
  if (!model) model = std::make_unique<Model>(dtype);
  return *model;
}

class WeightTypes : public ::testing::TestWithParam<std::tuple<Dtype, Isa>> {
 protected:
  void SetUp() override {
    set_isa(std::get<1>(GetParam()));
    start(Activations::kExact);
  }
  void start(std::optional<Activations> activations) {
    const bool rounded = is_quantized(std::get<0>(GetParam()));
    activations_ = activations.value_or(rounded ? Activations::kRounded : Activations::kExact);
    engine_ = std::make_unique<Engine>(LoadedModel::load(model_.config, io::Checkpoint::open(model_.path)),
                                       EngineOptions{2, Dtype::kF32, false, activations});
  }
  void TearDown() override { set_isa(supported_isas().back()); }

  // Runs the parts of a prompt and compares the logits of every token.
  void expect_logits(const std::vector<int64_t>& parts) {
    const int64_t length = std::accumulate(parts.begin(), parts.end(), int64_t{0});
    const auto ids = prompt(length);
    const int32_t slot = engine_->cache().acquire();
    std::vector<float> logits;
    int64_t past = 0;
    for (const int64_t n : parts) {
      const auto part = std::span(ids).subspan(static_cast<size_t>(past), static_cast<size_t>(n));
      const auto now = run(*engine_, slot, past, part);
      logits.insert(logits.end(), now.begin(), now.end());
      past += n;
    }
    engine_->cache().release(slot);
    const auto& expected = model_.logits.at(length);
    const auto [dtype, isa] = GetParam();
    EXPECT_TRUE(close(logits, expected, tolerance(dtype, isa, activations_)))
        << ::testing::PrintToString(parts) << ": " << relative_error(logits, expected);
    last_error_ = relative_error(logits, expected);
  }

  const Model& model_ = model_of(std::get<0>(GetParam()));
  std::unique_ptr<Engine> engine_;
  Activations activations_ = Activations::kExact;
  double last_error_ = 0;
};

TEST_P(WeightTypes, PrefillDecodeAndAnySplitAgreeWithTheOracle) {
  for (const int64_t length : kPrompts) expect_logits({length});
  expect_logits(std::vector<int64_t>(40, 1));
  const std::vector<std::vector<int64_t>> splits{
      {1, 299}, {299, 1}, {9, 40, 1, 250}, {7, 8, 23, 24, 16, 17, 205}, {64, 64, 64, 64, 44}};
  for (const auto& split : splits) expect_logits(split);
}

// With float weights only products of many tokens are rounded. Where nothing is (F32 weights, AVX2) the
// tolerance is the exact one.
TEST_P(WeightTypes, RoundedActivationsAgreeWithTheOracleToTheirRounding) {
  const auto [dtype, isa] = GetParam();
  for (const std::optional<Activations> activations : {std::optional(Activations::kRounded), {}}) {
    start(activations);
    for (const std::vector<int64_t>& parts : {std::vector<int64_t>{40}, {300}, {9, 40, 1, 250}})
      expect_logits(parts);
    expect_logits(std::vector<int64_t>(40, 1));
    expect_logits({9});
    if (!is_quantized(dtype)) {
      EXPECT_LT(last_error_, tolerance(dtype, isa, Activations::kExact)) << "9 tokens are computed as ever";
    }
  }
}

INSTANTIATE_TEST_SUITE_P(TypeIsa, WeightTypes,
                         ::testing::Combine(::testing::ValuesIn(kTypes),
                                            ::testing::ValuesIn(supported_isas().begin(),
                                                                supported_isas().end())),
                         [](const auto& test) {
                           return std::string(dtype_name(std::get<0>(test.param))) + "_" +
                                  std::string(isa_name(std::get<1>(test.param)));
                         });

}  // namespace
}  // namespace kilin::testing
