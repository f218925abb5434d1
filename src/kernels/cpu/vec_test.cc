// SPDX-License-Identifier: Apache-2.0
// The SIMD vocabulary's functions through the kernels that use them: vec.h itself is compiled per ISA only.
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <vector>

#include "base/cpu.h"
#include "base/thread_pool.h"
#include "kernels/norm/norm.h"

namespace kilin {
namespace {

class OnEveryIsa : public ::testing::TestWithParam<Isa> {
 protected:
  void SetUp() override { set_isa(GetParam()); }
  void TearDown() override { set_isa(supported_isas().back()); }
  ThreadPool pool_{2};
};

TEST_P(OnEveryIsa, silu_is_exact_to_a_few_ulp_over_the_whole_range) {
  std::vector<float> x, y;
  for (double v = -120; v <= 120; v += 0.00371) x.push_back(static_cast<float>(v));
  y.resize(x.size());
  silu(static_cast<int64_t>(x.size()), x.data(), y.data(), pool_);
  for (size_t i = 0; i < x.size(); ++i) {
    const double exact = x[i] / (1 + std::exp(-static_cast<double>(x[i])));
    // Below -87.3 e^-x overflows float and silu is cut to 0; its true size is below 1.2e-36 there.
    const double tolerance = x[i] < -87 ? 1.2e-36 : std::abs(exact) * 1e-6;
    ASSERT_NEAR(y[i], exact, tolerance) << "x = " << x[i];
  }
}

TEST_P(OnEveryIsa, silu_of_infinity_and_nan) {
  const float inf = std::numeric_limits<float>::infinity();
  std::vector<float> x{inf, 0.0f, -0.0f, std::numeric_limits<float>::quiet_NaN(), 1000.0f, -1000.0f};
  std::vector<float> y(x.size());
  silu(static_cast<int64_t>(x.size()), x.data(), y.data(), pool_);
  EXPECT_EQ(y[0], inf);
  EXPECT_EQ(y[1], 0.0f);
  EXPECT_EQ(y[2], 0.0f);
  EXPECT_TRUE(std::isnan(y[3]));
  EXPECT_EQ(y[4], 1000.0f);
  EXPECT_EQ(y[5], 0.0f);
}

INSTANTIATE_TEST_SUITE_P(Isa, OnEveryIsa,
                         ::testing::ValuesIn(supported_isas().begin(), supported_isas().end()),
                         [](const auto& test) { return std::string(isa_name(test.param)); });

}  // namespace
}  // namespace kilin
