// SPDX-License-Identifier: Apache-2.0
#include "kernels/mla/mla.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <vector>

#include "base/cpu.h"
#include "base/error.h"
#include "base/random.h"

namespace kilin {
namespace {

struct Shape {
  int64_t heads, nope, rope, value, latent;
};

// A cache of one sequence in pages, its queries and weights, and the definition of mla.h in double.
class Problem {
 public:
  Problem(const Shape& s, int64_t past, int64_t count, double score_scale, uint64_t seed) : random_(seed) {
    p_.heads = s.heads;
    p_.nope = s.nope;
    p_.rope = s.rope;
    p_.value = s.value;
    p_.latent = s.latent;
    p_.scale = static_cast<float>(score_scale / std::sqrt(static_cast<double>(s.nope + s.rope)));
    p_.page_tokens = 256;
    p_.page_stride = s.latent + s.rope;
    fill(weights_, s.heads * (s.nope + s.value) * s.latent, 1.0 / std::sqrt(static_cast<double>(s.latent)));
    p_.kv_b = {weights_.data(), Dtype::kF32, s.heads * (s.nope + s.value), s.latent};
    fill(q_, count * s.heads * (s.nope + s.rope), 1.0);
    p_.q = q_.data();
    out_.assign(static_cast<size_t>(count * s.heads * s.value), std::numeric_limits<float>::quiet_NaN());
    p_.out = out_.data();
    for (int64_t t = 0; t < past + count; t += 256) {
      pages_.emplace_back();
      // Rows that no query may see, and the padding, are NaN.
      pages_.back().assign(static_cast<size_t>(256 * p_.page_stride + kMlaPagePadding),
                           std::numeric_limits<float>::quiet_NaN());
      for (int64_t i = 0; i < std::min<int64_t>(256, past + count - t) * p_.page_stride; ++i) {
        pages_.back()[static_cast<size_t>(i)] = static_cast<float>(random_.normal());
      }
    }
    for (const auto& page : pages_) pointers_.push_back(page.data());
    sequence_ = {0, count, past, pointers_.data()};
    p_.sequences = 1;
    p_.sequence = &sequence_;
  }

  std::vector<double> exact() const {
    std::vector<double> out(out_.size());
    for (int64_t t = 0; t < sequence_.count; ++t) {
      for (int64_t h = 0; h < p_.heads; ++h) exact_row(t, h, out.data() + (t * p_.heads + h) * p_.value);
    }
    return out;
  }

  void expect_exact(const char* what) const {
    const auto reference = exact();
    double error = 0, norm = 1e-30;
    for (size_t i = 0; i < reference.size(); ++i) {
      ASSERT_FALSE(std::isnan(out_[i])) << what << " at " << i;
      error += (out_[i] - reference[i]) * (out_[i] - reference[i]);
      norm += reference[i] * reference[i];
    }
    EXPECT_LT(std::sqrt(error / norm), 3e-6) << what;
  }

  const MlaParams& params() const { return p_; }
  const MlaSequence& sequence() const { return sequence_; }
  std::vector<float>& out() { return out_; }

 private:
  void fill(std::vector<float>& v, int64_t n, double scale) {
    v.resize(static_cast<size_t>(n));
    for (float& x : v) x = static_cast<float>(scale * random_.normal());
  }
  double weight(int64_t row, int64_t c) const { return weights_[static_cast<size_t>(row * p_.latent + c)]; }
  const float* cached(int64_t j) const {
    return pages_[static_cast<size_t>(j / 256)].data() + j % 256 * p_.page_stride;
  }

  void exact_row(int64_t t, int64_t h, double* out) const {
    const float* q = q_.data() + (t * p_.heads + h) * (p_.nope + p_.rope);
    const int64_t first = h * (p_.nope + p_.value);
    std::vector<double> query(static_cast<size_t>(p_.latent), 0.0), context(query.size(), 0.0), scores;
    for (int64_t d = 0; d < p_.nope; ++d) {
      for (int64_t c = 0; c < p_.latent; ++c) query[static_cast<size_t>(c)] += q[d] * weight(first + d, c);
    }
    double top = -1e300, total = 0;
    for (int64_t j = 0; j <= sequence_.past + t; ++j) {
      double s = 0;
      for (int64_t c = 0; c < p_.latent; ++c) s += query[static_cast<size_t>(c)] * cached(j)[c];
      for (int64_t c = 0; c < p_.rope; ++c)
        s += static_cast<double>(q[p_.nope + c]) * cached(j)[p_.latent + c];
      scores.push_back(s * p_.scale);
      top = std::max(top, scores.back());
    }
    for (double& s : scores) total += s = std::exp(s - top);
    for (size_t j = 0; j < scores.size(); ++j) {
      for (int64_t c = 0; c < p_.latent; ++c) {
        context[static_cast<size_t>(c)] += scores[j] / total * cached(static_cast<int64_t>(j))[c];
      }
    }
    for (int64_t v = 0; v < p_.value; ++v) {
      out[v] = 0;
      for (int64_t c = 0; c < p_.latent; ++c)
        out[v] += weight(first + p_.nope + v, c) * context[static_cast<size_t>(c)];
    }
  }

  Random random_;
  MlaParams p_;
  MlaSequence sequence_;
  std::vector<float> weights_, q_, out_;
  std::vector<std::vector<float>> pages_;
  std::vector<const float*> pointers_;
};

class Mla : public ::testing::TestWithParam<Isa> {
 protected:
  void SetUp() override { set_isa(GetParam()); }
  void TearDown() override { set_isa(supported_isas().back()); }
  ThreadPool pool_{2};
};

constexpr Shape kShapes[] = {
    {4, 32, 16, 32, 64}, {2, 16, 8, 16, 32}, {3, 20, 6, 12, 44}, {2, 128, 64, 128, 512}};

TEST_P(Mla, both_orders_agree_with_the_definition_at_every_length) {
  for (const Shape& shape : kShapes) {
    const bool large = shape.latent > 100;
    for (auto [past, count] : {std::pair<int64_t, int64_t>{0, 1},
                               {0, 17},
                               {1, 2},
                               {127, 2},
                               {255, 3},
                               {130, 65},
                               {1100, 3},
                               {0, 200}}) {
      if (large && past + count > 130) continue;
      Problem problem(shape, past, count, 1.0, static_cast<uint64_t>(past * 1000 + count));
      mla_absorbed(problem.params(), problem.sequence(), pool_);
      problem.expect_exact("absorbed");
      problem.out().assign(problem.out().size(), std::numeric_limits<float>::quiet_NaN());
      mla_expanded(problem.params(), problem.sequence(), pool_);
      problem.expect_exact("expanded");
    }
  }
}

TEST_P(Mla, sharp_attention_neither_overflows_nor_loses_the_winner) {
  Problem problem(kShapes[0], 300, 5, 300.0, 3);
  mla_absorbed(problem.params(), problem.sequence(), pool_);
  problem.expect_exact("absorbed");
  problem.out().assign(problem.out().size(), 0.0f);
  mla_expanded(problem.params(), problem.sequence(), pool_);
  problem.expect_exact("expanded");
}

TEST_P(Mla, the_number_of_threads_does_not_change_a_bit) {
  for (auto [past, count] : {std::pair<int64_t, int64_t>{2500, 2}, {40, 700}}) {
    std::vector<std::vector<float>> results;
    for (int threads : {1, 2, 3}) {
      Problem problem(kShapes[1], past, count, 1.0, 8);
      ThreadPool pool(threads);
      mla_attention(problem.params(), pool);
      results.push_back(problem.out());
    }
    EXPECT_EQ(results[0], results[1]);
    EXPECT_EQ(results[0], results[2]);
  }
}

TEST(MlaLongContext, more_keys_than_pieces_and_more_queries_than_the_scratch_holds_change_nothing) {
  // 67,100 keys need pieces of more than 1,024; 2,200 query rows need two passes of 4 M floats of partial
  // sums.
  Problem problem(kShapes[1], 66000, 1100, 1.0, 5);
  ThreadPool pool(2);
  mla_absorbed(problem.params(), problem.sequence(), pool);
  const std::vector<float> absorbed = problem.out();
  mla_expanded(problem.params(), problem.sequence(), pool);
  double error = 0, norm = 0;
  for (size_t i = 0; i < absorbed.size(); ++i) {
    error += std::pow(static_cast<double>(absorbed[i]) - problem.out()[i], 2);
    norm += std::pow(static_cast<double>(absorbed[i]), 2);
  }
  EXPECT_LT(std::sqrt(error / norm), 1e-5);
}

TEST(MlaThreshold, is_where_the_orders_cost_the_same) {
  MlaParams p;
  p.nope = p.value = 128;
  p.rope = 64;
  p.latent = 512;
  EXPECT_EQ(mla_expand_threshold(p), 256 * 512 / 768 + 1);
  p.latent = 100;
  EXPECT_EQ(mla_expand_threshold(p), INT64_MAX);
}

TEST(Rope, turns_pairs_and_keeps_scores_a_function_of_the_distance) {
  Random random(2);
  std::vector<float> q(8), k(8);
  for (float& v : q) v = static_cast<float>(random.normal());
  for (float& v : k) v = static_cast<float>(random.normal());
  const auto score = [&](int64_t i, int64_t j) {
    auto a = q, b = k;
    rope_interleaved(1, 8, 10000.0, &i, a.data(), 8);
    rope_interleaved(1, 8, 10000.0, &j, b.data(), 8);
    double s = 0;
    for (size_t c = 0; c < 8; ++c) s += static_cast<double>(a[c]) * b[c];
    return s;
  };
  EXPECT_NEAR(score(7, 3), score(1004, 1000), 1e-5);
  EXPECT_GT(std::abs(score(7, 3) - score(7, 0)), 1e-3);
  std::vector<float> x{1, 0};
  const int64_t position = 1;
  rope_interleaved(1, 2, 10000.0, &position, x.data(), 2);
  EXPECT_NEAR(x[0], std::cos(1.0), 1e-7);
  EXPECT_NEAR(x[1], std::sin(1.0), 1e-7);
}

INSTANTIATE_TEST_SUITE_P(Isa, Mla, ::testing::ValuesIn(supported_isas().begin(), supported_isas().end()),
                         [](const auto& test) { return std::string(isa_name(test.param)); });

}  // namespace
}  // namespace kilin
