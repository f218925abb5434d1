// SPDX-License-Identifier: Apache-2.0
#include "kernels/mla/mla.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <vector>

#include "base/cpu.h"
#include "base/error.h"
#include "base/float16.h"
#include "base/random.h"
#include "kernels/cpu/scratch.h"
#include "kernels/mla/mla_isa.h"
#include "kernels/mla/mla_test_util.h"

namespace kilin {
namespace {

using mla_testing::Problem;
using mla_testing::relative_difference;
using mla_testing::Shape;

// Float32 sums of up to 576 products and a softmax of up to 1,100 keys, relative to the norm.
constexpr double kTolerance = 3e-6;

class Mla : public mla_testing::IsaCacheTest {
 protected:
  // AMX sums products of two bfloat16 terms, 2^-17 of each operand, one product of low terms left out.
  static double tolerance() { return isa() == Isa::kAmx ? 0x1p-17 + kTolerance : kTolerance; }
};

constexpr Shape kShapes[] = {{4, 32, 16, 32, 64}, {2, 16, 8, 16, 32},  {3, 20, 6, 12, 44},
                             {1, 7, 0, 5, 24},    {32, 16, 8, 16, 32}, {2, 128, 64, 128, 512},
                             {9, 16, 32, 16, 64}, {37, 16, 0, 16, 128}};

TEST_P(Mla, both_orders_agree_with_the_definition_at_every_length) {
  for (const Shape& shape : kShapes) {
    const bool large = shape.latent > 100 || shape.heads > 30;
    for (auto [past, count] : {std::pair<int64_t, int64_t>{0, 1},
                               {0, 17},
                               {1, 2},
                               {63, 1},
                               {64, 1},
                               {65, 3},
                               {127, 2},
                               {255, 3},
                               {130, 65},
                               {1100, 3},
                               {0, 200}}) {
      if (large && past + count > 130) continue;
      Problem problem(shape, {{past, count}}, type(), 1.0, static_cast<uint64_t>(past * 1000 + count));
      mla_absorbed(problem.params(), problem.sequence(), pool_);
      problem.expect_exact("absorbed", tolerance());
      problem.forget();
      mla_expanded(problem.params(), problem.sequence(), pool_);
      problem.expect_exact("expanded", tolerance());
    }
  }
}

TEST_P(Mla, sharp_attention_neither_overflows_nor_loses_the_winner) {
  Problem problem(kShapes[0], {{300, 5}}, type(), 300.0, 3);
  // A score of size 300 x 4 is rounded by 1e-4, which is then the relative error of a weight.
  mla_absorbed(problem.params(), problem.sequence(), pool_);
  problem.expect_exact("absorbed", 1e-4);
  problem.forget();
  mla_expanded(problem.params(), problem.sequence(), pool_);
  problem.expect_exact("expanded", 1e-4);
}

TEST_P(Mla, several_sequences_in_one_call_are_as_if_alone) {
  const std::vector<std::pair<int64_t, int64_t>> pasts{{5, 1}, {700, 3}, {0, 0}, {64, 90}, {0, 1}, {300, 1}};
  Problem problem(kShapes[1], pasts, type(), 1.0, 21);
  mla_attention(problem.params(), pool_);
  problem.expect_exact("together", tolerance());
  const std::vector<float> together = problem.out();
  problem.forget();
  for (size_t i = 0; i < pasts.size(); ++i) {
    MlaParams one = problem.params();
    one.sequences = 1;
    one.sequence += i;
    mla_attention(one, pool_);
  }
  EXPECT_LT(relative_difference(together, problem.out()), 1e-6);
}

TEST_P(Mla, the_number_of_threads_does_not_change_a_bit) {
  for (auto [past, count] : {std::pair<int64_t, int64_t>{2500, 2}, {40, 700}, {6000, 1}}) {
    std::vector<std::vector<float>> results;
    for (int threads : {1, 2, 3}) {
      Problem problem(kShapes[1], {{past, count}}, type(), 1.0, 8);
      ThreadPool pool(threads);
      mla_attention(problem.params(), pool);
      results.push_back(problem.out());
    }
    EXPECT_EQ(results[0], results[1]);
    EXPECT_EQ(results[0], results[2]);
  }
}

TEST_P(Mla, any_split_of_a_prompt_gives_the_same) {
  const int64_t tokens = 330;
  Problem whole(kShapes[0], {{0, tokens}}, type(), 1.0, 77);
  mla_expanded(whole.params(), whole.sequence(), pool_);
  const std::vector<float> expected = whole.out();
  whole.forget();
  int64_t past = 0;
  for (int64_t count : {1, 2, 61, 1, 64, 129, 72}) {
    MlaSequence part = whole.sequence();
    part.first = part.past = past;
    part.count = count;
    MlaParams p = whole.params();
    p.sequence = &part;
    mla_attention(p, pool_);
    past += count;
  }
  ASSERT_EQ(past, tokens);
  EXPECT_LT(relative_difference(expected, whole.out()), 1e-5);
}

// Rounding to float16 moves a latent by at most 2^-11 of itself, to bfloat16 by 2^-8. A score is a sum of
// products of these, its error at most that times the sum of their sizes, but with independent signs the norm
// counts: q.c of standard deviation 1 (scaled) moves by 2^-11 / sqrt(3) of it, a value by as much again:
// sqrt(2) 2^-11 / sqrt(3) in the norm.
TEST_P(Mla, a_half_precision_cache_costs_what_its_rounding_costs) {
  if (type() == Dtype::kF32) return;
  Problem problem(kShapes[5], {{120, 3}}, type(), 1.0, 11);
  const double bound = std::sqrt(2.0 / 3.0) * (type() == Dtype::kF16 ? 0x1p-11 : 0x1p-8);
  mla_absorbed(problem.params(), problem.sequence(), pool_);
  problem.expect_exact("absorbed", bound, false);
  problem.forget();
  mla_expanded(problem.params(), problem.sequence(), pool_);
  problem.expect_exact("expanded", bound, false);
}

TEST_P(Mla, rows_of_the_cache_keep_what_their_type_can_hold) {
  const float large = type() == Dtype::kF16 ? 65519.0f : 3e38f;
  // what the largest becomes, and the first that rounds to infinity
  const float kept = type() == Dtype::kF16    ? 65504.0f
                     : type() == Dtype::kBF16 ? to_float(to_bfloat16(large))
                                              : large;
  const float too_large = type() == Dtype::kF16 ? 65520.0f : 0x1.ffp127f;
  for (int64_t width : {1, 5, 16, 37}) {
    std::vector<float> row(static_cast<size_t>(width), 0.25f), back(row.size());
    std::vector<uint16_t> stored(2 * row.size(), 0);
    row.back() = -large;
    EXPECT_TRUE(mla_store_row(type(), width, row.data(), stored.data()));
    mla_load_row(type(), width, stored.data(), back.data());
    EXPECT_EQ(back.back(), -kept);
    row.back() = too_large;
    EXPECT_EQ(mla_store_row(type(), width, row.data(), stored.data()), type() == Dtype::kF32);
    row.back() = std::numeric_limits<float>::infinity();
    EXPECT_TRUE(mla_store_row(type(), width, row.data(), stored.data())) << "nothing was lost";
  }
}

TEST_P(Mla, every_half_and_every_rounding_is_ieee) {
  if (type() != Dtype::kF16) return;
  Random random(5);
  std::vector<float> row;
  for (uint32_t bits = 0; bits < 0x7c00; ++bits)
    row.push_back(to_float(Float16{static_cast<uint16_t>(bits)}));
  for (int i = 0; i < 20000; ++i) {
    row.push_back(static_cast<float>(random.normal() * std::exp2(static_cast<double>(i % 40) - 26.0)));
  }
  for (float& x : row) x = std::min(std::max(x, -65504.0f), 65504.0f);
  std::vector<uint16_t> stored(row.size());
  EXPECT_TRUE(mla_store_row(type(), static_cast<int64_t>(row.size()), row.data(), stored.data()));
  for (size_t i = 0; i < row.size(); ++i) ASSERT_EQ(stored[i], to_float16(row[i]).bits) << row[i];
  std::vector<float> back(row.size());
  KILIN_DISPATCH(mla_load_rows)
  (Dtype::kF16, 1, static_cast<int64_t>(row.size()), stored.data(), 0,
   (back.resize(row.size() + 16), back.data()));
  for (size_t i = 0; i < row.size(); ++i) ASSERT_EQ(back[i], to_float(Float16{stored[i]}));
}

TEST(MlaLongContext, more_keys_than_pieces_and_more_queries_than_the_scratch_holds_change_nothing) {
  // 67,100 keys need pieces of more than 256; 2,200 query rows need several passes of partial sums.
  Problem problem(kShapes[1], {{66000, 1100}}, Dtype::kF16, 1.0, 5);
  ThreadPool pool(2);
  mla_absorbed(problem.params(), problem.sequence(), pool);
  const std::vector<float> absorbed = problem.out();
  mla_expanded(problem.params(), problem.sequence(), pool);
  EXPECT_LT(relative_difference(absorbed, problem.out()), 1e-5);
}

TEST(MlaThreshold, is_where_the_orders_take_the_same_time) {
  MlaParams p;
  p.nope = p.value = 128;
  p.rope = 64;
  p.latent = 512;
  set_isa(Isa::kPortable);
  EXPECT_EQ(mla_expand_threshold(p), 256 * 512 / 768 + 1);
  set_isa(supported_isas().back());
  EXPECT_GE(mla_expand_threshold(p), 256 * 512 / 768 + 1);
  EXPECT_LE(mla_expand_threshold(p), 512) << "a chunk of prefill is expanded";
  p.latent = 100;
  EXPECT_EQ(mla_expand_threshold(p), INT64_MAX);
  p.latent = 512;
  WeightMatrix quantised;
  quantised.dtype = Dtype::kQ8_0;
  p.value_up = &quantised;
  p.activations = Activations::kRounded;
  EXPECT_GE(mla_expand_threshold(p), 100);
  EXPECT_LE(mla_expand_threshold(p), 512);
}

TEST(MlaErrors, layouts_that_the_kernels_cannot_read_are_refused) {
  ThreadPool pool(1);
  MlaParams p;
  p.latent = 8;
  p.page_tokens = 64;
  p.page_stride = 8;
  mla_attention(p, pool);
  p.cache_type = Dtype::kQ8_0;
  EXPECT_THROW(mla_attention(p, pool), Error);
  p.cache_type = Dtype::kF16;
  p.page_tokens = 65;
  EXPECT_THROW(mla_attention(p, pool), Error);
  p.page_tokens = 64;
  p.page_stride = 7;
  EXPECT_THROW(mla_attention(p, pool), Error);
}

#if !defined(__SANITIZE_ADDRESS__)  // which ends the program instead of throwing bad_alloc
TEST(MlaErrors, scratch_that_could_not_grow_is_made_anew) {
  Scratch<float> scratch;
  scratch.get(64);
  EXPECT_THROW(scratch.get(int64_t{1} << 56), std::bad_alloc);
  float* memory = scratch.get(8);
  ASSERT_NE(memory, nullptr);
  std::fill_n(memory, 8, 1.0f);
}
#endif

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

INSTANTIATE_TEST_SUITE_P(IsaCache, Mla, mla_testing::isas_and_caches(), mla_testing::isa_and_cache);

}  // namespace
}  // namespace kilin
