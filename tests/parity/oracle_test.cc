// SPDX-License-Identifier: Apache-2.0
// The engine against the oracle in double on every member of the family that a config.json can ask for, with
// random weights: layer kinds, gates, convolution, positions, routing, tied head.
#include <gtest/gtest.h>

#include "base/cpu.h"
#include "base/random.h"
#include "oracle/scalar_ops.h"
#include "support/reference.h"
#include "support/variants.h"

namespace kilin::testing {
namespace {

// What the engine and the oracle are both given: sequences of a batch with their logits.
struct Input {
  std::vector<int32_t> tokens, cu{0}, slots, wanted;
  std::vector<int64_t> past;
  Batch batch() const { return {tokens, cu, slots, past, wanted}; }
};

Input make_input(const std::vector<int64_t>& lengths, const std::vector<int32_t>& slots,
                 const std::vector<int64_t>& past, int64_t vocab, Random& random) {
  Input input;
  for (const int64_t length : lengths) {
    for (int64_t i = 0; i < length; ++i)
      input.tokens.push_back(static_cast<int32_t>(random.below(static_cast<uint64_t>(vocab))));
    input.cu.push_back(static_cast<int32_t>(input.tokens.size()));
  }
  input.slots = slots;
  input.past = past;
  for (size_t i = 0; i < input.tokens.size(); ++i) input.wanted.push_back(static_cast<int32_t>(i));
  return input;
}

class Family : public ::testing::TestWithParam<std::tuple<Isa, Variant>> {
 protected:
  void SetUp() override { set_isa(std::get<0>(GetParam())); }
  void TearDown() override { set_isa(supported_isas().back()); }

  void expect_agreement(const std::string& compat) {
    const Config config = config_of(std::get<1>(GetParam()), compat);
    Engine engine(LoadedModel::random(config, 77, StoredValues::kKeep), {2, Dtype::kF32});
    ModelWeights<Matrix<double>> weights(config);
    size_t i = 0;
    visit_parameters(weights, config, [&](const Parameter& p, Matrix<double>& w) {
      w = widen<double>(p, engine.model().table()[i++].view);
    });
    ScalarOps<double> oracle(config);
    Random random(5);
    const std::vector<int32_t> slots{engine.cache().acquire(), engine.cache().acquire()};
    // A prefill of two sequences, then a decode step of both, then a longer piece for one of them.
    for (const Input& input : {make_input({70, 3}, slots, {0, 0}, config.vocab_size, random),
                               make_input({1, 1}, slots, {70, 3}, config.vocab_size, random),
                               make_input({19}, {slots[1]}, {4}, config.vocab_size, random)}) {
      const auto ours = engine.forward(input.batch());
      oracle.begin(input.batch());
      const auto exact = model_forward(oracle, config, weights);
      const std::vector<float> expected(exact.v.begin(), exact.v.end());
      EXPECT_TRUE(close(ours, expected, 2e-5)) << compat << ", " << input.tokens.size() << " tokens";
    }
  }
};

TEST_P(Family, engine_agrees_with_the_oracle_in_prefill_decode_and_continuation) {
  expect_agreement("transformers");
}

INSTANTIATE_TEST_SUITE_P(IsaVariant, Family,
                         ::testing::Combine(::testing::ValuesIn(supported_isas().begin(),
                                                                supported_isas().end()),
                                            ::testing::ValuesIn(variants())),
                         [](const auto& test) {
                           return std::string(isa_name(std::get<0>(test.param))) + "_" +
                                  std::get<1>(test.param).name;
                         });

class Compatible : public Family {};
TEST_P(Compatible, each_compatibility_agrees_with_the_oracle) {
  for (const char* compat : {"remote-code", "vllm"}) expect_agreement(compat);
}
INSTANTIATE_TEST_SUITE_P(Best, Compatible,
                         ::testing::Values(std::tuple(supported_isas().back(), variants()[0])),
                         [](const auto& test) { return std::get<1>(test.param).name; });

TEST(Compatibility, choices_change_the_result) {
  const auto logits = [](const std::string& compat) {
    const std::string directory = reference_path("tiny-random");
    Engine engine(LoadedModel::load(read_config_file(directory + "/config.json", compat),
                                    io::Checkpoint::open(directory)),
                  {1, Dtype::kF32});
    return run(engine, engine.cache().acquire(), 0, Golden("tiny_random_t130").ids("input_ids"));
  };
  const auto native = logits("transformers"), remote = logits("remote-code"), vllm = logits("vllm");
  EXPECT_GT(relative_error(remote, native), 1e-4);
  EXPECT_GT(relative_error(vllm, native), 1e-8);
  EXPECT_LT(relative_error(vllm, native), 1e-3);
}

}  // namespace
}  // namespace kilin::testing
