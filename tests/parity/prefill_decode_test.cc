// SPDX-License-Identifier: Apache-2.0
// One text, one result: however the tokens of a sequence are cut into calls and whatever else is in the
// batch, logits and states agree.
#include <gtest/gtest.h>

#include <cstring>
#include <numeric>

#include "base/cpu.h"
#include "base/random.h"
#include "support/reference.h"

namespace kilin::testing {
namespace {

constexpr double kTolerance = 1e-4;  // relative; float32 sums in another order over 8 layers

std::vector<int32_t> random_tokens(int64_t n, int64_t vocab, uint64_t seed) {
  Random random(seed);
  std::vector<int32_t> ids(static_cast<size_t>(n));
  for (int32_t& id : ids) id = static_cast<int32_t>(random.below(static_cast<uint64_t>(vocab)));
  return ids;
}

std::vector<float> state_of(Engine& engine, int32_t slot, int64_t tokens) {
  const auto bytes = engine.cache().save(slot, tokens);
  std::vector<float> values(bytes.size() / sizeof(float));
  std::memcpy(values.data(), bytes.data(), bytes.size());
  return values;
}

class Parity : public ::testing::TestWithParam<Isa> {
 protected:
  void SetUp() override {
    set_isa(GetParam());
    engine_ = std::make_unique<Engine>(load_model(bundled_model()), EngineOptions{2, Dtype::kF32});
  }
  void TearDown() override { set_isa(supported_isas().back()); }
  int64_t vocab() const { return engine_->config().vocab_size; }
  std::unique_ptr<Engine> engine_;
};

TEST_P(Parity, prefill_equals_token_by_token_decode) {
  const auto ids = random_tokens(1000, vocab(), 1);
  // Token by token, keeping what each length needs.
  const std::vector<int64_t> lengths{1, 2, 15, 16, 17, 63, 64, 65, 127, 128, 129, 1000};
  const int32_t slow = engine_->cache().acquire();
  std::map<int64_t, std::pair<std::vector<float>, std::vector<float>>> expected;
  for (int64_t t = 0; t < 1000; ++t) {
    auto logits = run(*engine_, slow, t, std::span(ids).subspan(static_cast<size_t>(t), 1));
    if (std::find(lengths.begin(), lengths.end(), t + 1) != lengths.end()) {
      expected[t + 1] = {std::move(logits), state_of(*engine_, slow, t + 1)};
    }
  }
  for (int64_t length : lengths) {
    const int32_t slot = engine_->cache().acquire();
    const auto logits = run(*engine_, slot, 0, std::span(ids).first(static_cast<size_t>(length)), false);
    EXPECT_TRUE(close(logits, expected[length].first, kTolerance)) << "logits, length " << length;
    EXPECT_TRUE(close(state_of(*engine_, slot, length), expected[length].second, kTolerance))
        << "state, length " << length;
    engine_->cache().release(slot);
  }
}

TEST_P(Parity, any_split_of_the_prompt_gives_the_same_result) {
  // Text of the reference with a known routing margin (3.8e-5): random tokens may meet a tie between two
  // experts, where sums in another order rightly choose the other one.
  const auto ids = Golden("docs_prompt_300").ids("input_ids");
  const int32_t whole = engine_->cache().acquire();
  const auto expected = run(*engine_, whole, 0, ids, false);
  const auto expected_state = state_of(*engine_, whole, 300);
  const std::vector<std::vector<int64_t>> splits{
      {1, 299}, {299, 1}, {64, 64, 64, 64, 44}, {63, 65, 17, 100, 55}, {16, 1, 283}, {150, 0, 150}};
  for (const auto& split : splits) {
    const int32_t slot = engine_->cache().acquire();
    int64_t past = 0;
    std::vector<float> logits;
    for (int64_t n : split) {
      const auto part = std::span(ids).subspan(static_cast<size_t>(past), static_cast<size_t>(n));
      auto now = run(*engine_, slot, past, part, false);
      if (n > 0) logits = std::move(now);
      past += n;
    }
    EXPECT_TRUE(close(logits, expected, kTolerance)) << "split " << ::testing::PrintToString(split);
    EXPECT_TRUE(close(state_of(*engine_, slot, 300), expected_state, kTolerance))
        << ::testing::PrintToString(split);
    engine_->cache().release(slot);
  }
}

TEST_P(Parity, the_composition_of_a_batch_does_not_matter) {
  // New and continued sequences, long and single-token and empty ones, side by side.
  const std::vector<int64_t> past{0, 40, 7, 3, 0, 130}, count{70, 1, 0, 20, 1, 1};
  std::vector<std::vector<int32_t>> ids;
  std::vector<int32_t> tokens, cu{0}, slots, wanted;
  std::vector<std::vector<float>> expected, expected_state;
  for (size_t s = 0; s < past.size(); ++s) {
    ids.push_back(random_tokens(past[s] + count[s], vocab(), 10 + s));
    const auto before = std::span<const int32_t>(ids[s]).first(static_cast<size_t>(past[s]));
    const auto now = std::span<const int32_t>(ids[s]).subspan(static_cast<size_t>(past[s]));
    const int32_t alone = engine_->cache().acquire();
    run(*engine_, alone, 0, before);
    expected.push_back(run(*engine_, alone, past[s], now, false));
    expected_state.push_back(state_of(*engine_, alone, past[s] + count[s]));
    slots.push_back(engine_->cache().acquire());
    run(*engine_, slots.back(), 0, before);
    tokens.insert(tokens.end(), now.begin(), now.end());
    cu.push_back(static_cast<int32_t>(tokens.size()));
    if (count[s] > 0) wanted.push_back(cu.back() - 1);
  }
  const auto logits = engine_->forward({tokens, cu, slots, past, wanted});
  size_t row = 0;
  for (size_t s = 0; s < past.size(); ++s) {
    if (count[s] > 0) {
      const auto ours = logits.subspan(row++ * static_cast<size_t>(vocab()), static_cast<size_t>(vocab()));
      EXPECT_TRUE(close(ours, expected[s], kTolerance)) << "sequence " << s;
    }
    EXPECT_TRUE(close(state_of(*engine_, slots[s], past[s] + count[s]), expected_state[s], kTolerance))
        << "state " << s;
  }
}

TEST_P(Parity, the_number_of_threads_does_not_change_a_bit) {
  const auto ids = random_tokens(200, vocab(), 4);
  std::vector<std::vector<float>> results;
  for (int threads : {1, 2, 5}) {
    Engine engine(load_model(bundled_model()), {threads});
    const int32_t slot = engine.cache().acquire();
    auto logits = run(engine, slot, 0, std::span(ids).first(199));
    const auto last = run(engine, slot, 199, std::span(ids).last(1));
    logits.insert(logits.end(), last.begin(), last.end());
    results.push_back(std::move(logits));
  }
  EXPECT_EQ(results[0], results[1]);
  EXPECT_EQ(results[0], results[2]);
}

INSTANTIATE_TEST_SUITE_P(Isa, Parity, ::testing::ValuesIn(supported_isas().begin(), supported_isas().end()),
                         [](const auto& test) { return std::string(isa_name(test.param)); });

}  // namespace
}  // namespace kilin::testing
