// SPDX-License-Identifier: Apache-2.0
// Latent attention with rounded activations, against the definition in double.
#include <gtest/gtest.h>

#include <cmath>
#include <utility>
#include <vector>

#include "base/cpu.h"
#include "base/thread_pool.h"
#include "kernels/mla/mla.h"
#include "kernels/mla/mla_orders.h"
#include "kernels/mla/mla_test_util.h"

namespace kilin {
namespace {

using mla_testing::Problem;
using mla_testing::relative_difference;
using mla_testing::Shape;

// A number rounded to bfloat16 moves by up to 2^-8 of itself, evenly; the root mean square over a binade is
// 0.72 2^-8 / sqrt(3) = 1.6e-3 (docs/decisions/rounded-activations.md). An output is a sum of weights times
// values. Rounded are the latents, W_UV, the values and the weights, each of which moves it by that much, and
// in the score latents, W_UK, keys and queries, which move it by that much of the score's standard deviation, 1
// here, and the weight likewise: 1.6e-3 sqrt(8) = 4.5e-3, with a quarter for what few keys leave to chance.
constexpr double kRounded = 5.7e-3;

class MlaRounded : public ::testing::TestWithParam<std::tuple<Isa, Dtype>> {
 protected:
  void SetUp() override { set_isa(std::get<0>(GetParam())); }
  void TearDown() override { set_isa(supported_isas().back()); }
  static Dtype type() { return std::get<1>(GetParam()); }
  static MlaParams rounded(const Problem& problem) {
    MlaParams p = problem.params();
    p.activations = Activations::kRounded;
    return p;
  }
  ThreadPool pool_{2};
};

constexpr Shape kShapes[] = {{4, 32, 16, 32, 64}, {2, 16, 8, 16, 32},  {3, 20, 6, 12, 44},
                             {1, 7, 0, 5, 24},    {32, 16, 8, 16, 32}, {2, 128, 64, 128, 512},
                             {9, 16, 32, 16, 64}, {37, 16, 0, 16, 128}};

TEST_P(MlaRounded, agrees_with_the_definition_to_the_rounding_at_every_length) {
  for (const Shape& shape : kShapes) {
    const bool large = shape.latent > 100 || shape.heads > 30;
    for (auto [past, count] : {std::pair<int64_t, int64_t>{0, 1},
                               {0, 17},
                               {1, 2},
                               {63, 1},
                               {127, 2},
                               {128, 3},
                               {130, 65},
                               {1100, 3},
                               {0, 200},
                               {31, 97}}) {
      if (large && past + count > 130) continue;
      Problem problem(shape, {{past, count}}, type(), 1.0, static_cast<uint64_t>(past * 1000 + count));
      mla_expanded(rounded(problem), problem.sequence(), pool_);
      problem.expect_exact("expanded", kRounded);
      if (!mla_rounds(rounded(problem))) continue;
      problem.forget();
      mla_expanded(problem.params(), problem.sequence(), pool_);
      problem.expect_exact("exact", 1e-4);
    }
  }
}

INSTANTIATE_TEST_SUITE_P(IsaCache, MlaRounded,
                         ::testing::Combine(::testing::ValuesIn(supported_isas().begin(), supported_isas().end()),
                                            ::testing::Values(Dtype::kF16, Dtype::kF32)),
                         [](const auto& test) {
                           return std::string(isa_name(std::get<0>(test.param))) + "_" +
                                  std::string(dtype_name(std::get<1>(test.param)));
                         });

}  // namespace
}  // namespace kilin
