// SPDX-License-Identifier: Apache-2.0
#include "kernels/moe/moe.h"

#include <gtest/gtest.h>

#include <cmath>
#include <memory>
#include <new>
#include <vector>

#include "base/cpu.h"
#include "base/random.h"

namespace kilin {
namespace {

RouterParams sigmoid_router(int experts, int top_k) {
  RouterParams p;
  p.experts = experts;
  p.top_k = top_k;
  return p;
}

double sigmoid(double x) { return 1 / (1 + std::exp(-x)); }

TEST(Route, bias_decides_the_choice_but_not_the_weight) {
  RouterParams p = sigmoid_router(4, 2);
  p.scale = 2.446f;
  const std::vector<float> logits{1.0f, 0.5f, -1.0f, 0.0f}, bias{0.0f, 0.0f, 10.0f, 0.0f};
  std::vector<int32_t> ids(2);
  std::vector<float> weights(2);
  route(p, 1, logits.data(), bias.data(), ids.data(), weights.data());
  EXPECT_EQ(ids, (std::vector<int32_t>{2, 0}));
  const double sum = sigmoid(-1.0) + sigmoid(1.0);
  EXPECT_NEAR(weights[0], sigmoid(-1.0) / sum * 2.446, 1e-6);
  EXPECT_NEAR(weights[1], sigmoid(1.0) / sum * 2.446, 1e-6);
}

TEST(Route, biased_weights_follow_the_remote_code) {
  RouterParams p = sigmoid_router(3, 1);
  p.biased_weights = true;
  p.renormalize = false;
  const std::vector<float> logits{0.0f, 1.0f, 2.0f}, bias{3.0f, 0.0f, 0.0f};
  int32_t id = -1;
  float weight = 0;
  route(p, 1, logits.data(), bias.data(), &id, &weight);
  EXPECT_EQ(id, 0);
  EXPECT_NEAR(weight, 3.5, 1e-6);
}

TEST(Route, only_the_best_groups_are_eligible) {
  // Three groups of two: sums of choices 1.2, 1.3, 1.0. The single best expert (0.9) sits in the worst group.
  RouterParams p = sigmoid_router(6, 2);
  p.groups = 3;
  p.groups_kept = 2;
  p.renormalize = false;
  const auto logit = [](double s) { return static_cast<float>(std::log(s / (1 - s))); };
  const std::vector<float> logits{logit(0.6), logit(0.6), logit(0.65), logit(0.65), logit(0.9), logit(0.1)};
  std::vector<int32_t> ids(2);
  std::vector<float> weights(2);
  route(p, 1, logits.data(), nullptr, ids.data(), weights.data());
  EXPECT_EQ(ids, (std::vector<int32_t>{2, 3}));
}

TEST(Route, ties_go_to_the_lower_index_and_softmax_sums_to_one) {
  RouterParams p = sigmoid_router(5, 5);
  p.activation = RouterActivation::kSoftmax;
  p.renormalize = false;
  const std::vector<float> logits{1, 2, 2, 1, 2};
  std::vector<int32_t> ids(5);
  std::vector<float> weights(5);
  route(p, 1, logits.data(), nullptr, ids.data(), weights.data());
  EXPECT_EQ(ids, (std::vector<int32_t>{1, 2, 4, 0, 3}));
  float sum = 0;
  for (float w : weights) sum += w;
  EXPECT_NEAR(sum, 1.0f, 1e-6);
}

class Experts : public ::testing::TestWithParam<Isa> {
 protected:
  static constexpr int64_t kHidden = 40, kWidth = 24;
  void SetUp() override {
    set_isa(GetParam());
    for (int e = 0; e <= 7; ++e) {  // the last one is the shared expert, twice as wide
      const int64_t width = e == 7 ? 2 * kWidth : kWidth;
      experts_.push_back({matrix(width, kHidden), matrix(width, kHidden), matrix(kHidden, width)});
    }
  }
  void TearDown() override { set_isa(supported_isas().back()); }

  WeightMatrix matrix(int64_t rows, int64_t cols) {
    std::vector<float> values(static_cast<size_t>(rows * cols));
    for (float& v : values) v = static_cast<float>(0.3 * random_.normal());
    const size_t size = packed_bytes(Dtype::kF32, rows, cols);
    storage_.emplace_back(static_cast<std::byte*>(::operator new (size, std::align_val_t{kPackAlignment})));
    pack_weights(Dtype::kF32, values.data(), rows, cols, 0, rows, storage_.back().get());
    return {storage_.back().get(), Dtype::kF32, rows, cols};
  }
  static double at(const WeightMatrix& w, int64_t r, int64_t c) {
    std::vector<float> row(static_cast<size_t>(w.cols));
    unpack_row(w, r, row.data());
    return row[static_cast<size_t>(c)];
  }
  static void add_expert(const ExpertWeights& e, const float* x, double weight, std::vector<double>& y) {
    for (int64_t i = 0; i < e.gate.rows; ++i) {
      double gate = 0, up = 0;
      for (int64_t c = 0; c < kHidden; ++c) {
        gate += at(e.gate, i, c) * x[c];
        up += at(e.up, i, c) * x[c];
      }
      const double hidden = gate * sigmoid(gate) * up * weight;
      for (int64_t c = 0; c < kHidden; ++c) y[static_cast<size_t>(c)] += at(e.down, c, i) * hidden;
    }
  }
  Random random_{21};
  struct Free {
    void operator()(std::byte* p) const { ::operator delete (p, std::align_val_t{kPackAlignment}); }
  };
  std::vector<std::unique_ptr<std::byte, Free>> storage_;
  std::vector<ExpertWeights> experts_;
};

TEST_P(Experts, grouped_products_equal_the_sum_over_each_tokens_experts) {
  ThreadPool pool(2);
  MoeScratch scratch;
  const std::span<const ExpertWeights> routed(experts_.data(), 7);
  for (bool with_shared : {false, true}) {
    for (int64_t tokens : {0, 1, 2, 9, 65}) {
      const int top_k = 3;
      std::vector<float> x(static_cast<size_t>(tokens * kHidden)),
          weights(static_cast<size_t>(tokens * top_k));
      std::vector<int32_t> ids(weights.size());
      for (float& v : x) v = static_cast<float>(random_.normal());
      for (size_t i = 0; i < ids.size(); ++i) {
        ids[i] = static_cast<int32_t>((i / 3 * 2 + i % 3 * 3) % 7);  // expert 6 and others get uneven shares
        weights[i] = static_cast<float>(random_.uniform());
      }
      std::vector<float> y(x.size(), 99.0f);
      moe_experts(tokens, kHidden, top_k, x.data(), ids.data(), weights.data(), routed,
                  with_shared ? &experts_[7] : nullptr, y.data(), scratch, pool);
      for (int64_t t = 0; t < tokens; ++t) {
        std::vector<double> exact(static_cast<size_t>(kHidden), 0.0);
        for (int j = 0; j < top_k; ++j) {
          const auto at = static_cast<size_t>(t * top_k + j);
          add_expert(experts_[static_cast<size_t>(ids[at])], x.data() + t * kHidden, weights[at], exact);
        }
        if (with_shared) add_expert(experts_[7], x.data() + t * kHidden, 1.0, exact);
        for (int64_t c = 0; c < kHidden; ++c) {
          ASSERT_NEAR(y[static_cast<size_t>(t * kHidden + c)], exact[static_cast<size_t>(c)], 2e-5) << tokens;
        }
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Isa, Experts, ::testing::ValuesIn(supported_isas().begin(), supported_isas().end()),
                         [](const auto& test) { return std::string(isa_name(test.param)); });

}  // namespace
}  // namespace kilin
