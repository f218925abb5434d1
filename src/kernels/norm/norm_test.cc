// SPDX-License-Identifier: Apache-2.0
#include "kernels/norm/norm.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <vector>

#include "base/cpu.h"
#include "base/random.h"

namespace kilin {
namespace {

class Norm : public ::testing::TestWithParam<Isa> {
 protected:
  void SetUp() override { set_isa(GetParam()); }
  void TearDown() override { set_isa(supported_isas().back()); }
  std::vector<float> normal(int64_t n, double scale = 1.0) {
    std::vector<float> v(static_cast<size_t>(n));
    for (float& x : v) x = static_cast<float>(scale * random_.normal());
    return v;
  }
  Random random_{11};
  ThreadPool pool_{2};
};

double root(const float* x, int64_t n, double eps) {
  double sum = 0;
  for (int64_t i = 0; i < n; ++i) sum += static_cast<double>(x[i]) * x[i];
  return std::sqrt(sum / static_cast<double>(n) + eps);
}

TEST_P(Norm, rms_norm_agrees_with_double_for_every_width) {
  for (int64_t width : {1, 15, 16, 17, 64, 129}) {
    for (int64_t tokens : {0, 1, 3, 300}) {
      const auto x = normal(tokens * width, 3.0);
      const auto w = normal(width);
      std::vector<float> y(x.size());
      rms_norm(tokens, width, x.data(), width, w.data(), 1e-5f, y.data(), width, pool_);
      for (int64_t t = 0; t < tokens; ++t) {
        const double r = root(x.data() + t * width, width, 1e-5);
        for (int64_t i = 0; i < width; ++i) {
          const double exact = w[static_cast<size_t>(i)] * x[static_cast<size_t>(t * width + i)] / r;
          ASSERT_NEAR(y[static_cast<size_t>(t * width + i)], exact, 1e-6 * (std::abs(exact) + 1e-3)) << width;
        }
      }
    }
  }
}

TEST_P(Norm, epsilon_bounds_a_row_of_zeros) {
  std::vector<float> x(8, 0.0f), w(8, 1.0f), y(8, 5.0f);
  rms_norm(1, 8, x.data(), 8, w.data(), 1e-5f, y.data(), 8, pool_);
  for (float v : y) EXPECT_EQ(v, 0.0f);
}

TEST_P(Norm, gated_norm_multiplies_by_the_activation) {
  const int64_t tokens = 5, heads = 3, width = 20;
  const auto x = normal(tokens * heads * width), z = normal(tokens * heads * width, 4.0), w = normal(width);
  for (GateActivation activation : {GateActivation::kNone, GateActivation::kSigmoid, GateActivation::kSilu}) {
    std::vector<float> y(x.size());
    gated_rms_norm(tokens, heads, width, x.data(), w.data(), 1e-5f, z.data(), activation, y.data(), pool_);
    for (int64_t r = 0; r < tokens * heads; ++r) {
      const double scale = root(x.data() + r * width, width, 1e-5);
      for (int64_t i = 0; i < width; ++i) {
        const auto at = static_cast<size_t>(r * width + i);
        const double s = 1 / (1 + std::exp(-static_cast<double>(z[at])));
        const double gate = activation == GateActivation::kNone   ? 1
                            : activation == GateActivation::kSilu ? s * z[at]
                                                                  : s;
        ASSERT_NEAR(y[at], w[static_cast<size_t>(i)] * x[at] / scale * gate, 3e-6);
      }
    }
  }
}

TEST_P(Norm, elementwise_operations_agree_with_double) {
  for (int64_t n : {1, 16, 37, 40000}) {
    const auto a = normal(n), b = normal(n);
    std::vector<float> y(a.size());
    swiglu(n, a.data(), b.data(), y.data(), pool_);
    std::vector<float> sum = a;
    add_in_place(n, sum.data(), b.data(), pool_);
    std::vector<float> scaled = a;
    add_scaled(n, -2.5f, b.data(), scaled.data());
    for (size_t i = 0; i < a.size(); ++i) {
      const double exact = a[i] / (1 + std::exp(-static_cast<double>(a[i]))) * b[i];
      ASSERT_NEAR(y[i], exact, 1e-6 * (std::abs(exact) + 1e-6));
      ASSERT_EQ(sum[i], a[i] + b[i]);
      ASSERT_NEAR(scaled[i], a[i] - 2.5 * b[i], 1e-6 * (std::abs(a[i]) + 3 * std::abs(b[i])));
    }
  }
}

TEST_P(Norm, finds_a_single_nan_or_infinity_anywhere) {
  for (int64_t n : {1, 16, 33}) {
    std::vector<float> x(static_cast<size_t>(n), 3e38f);
    EXPECT_TRUE(all_finite(n, x.data()));
    for (size_t i = 0; i < x.size(); ++i) {
      for (float bad : {std::numeric_limits<float>::quiet_NaN(), -std::numeric_limits<float>::infinity()}) {
        x[i] = bad;
        EXPECT_FALSE(all_finite(n, x.data())) << i;
      }
      x[i] = 1;
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Isa, Norm, ::testing::ValuesIn(supported_isas().begin(), supported_isas().end()),
                         [](const auto& test) { return std::string(isa_name(test.param)); });

}  // namespace
}  // namespace kilin
