// SPDX-License-Identifier: Apache-2.0
#include "kernels/conv/short_conv.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "base/cpu.h"
#include "base/error.h"
#include "base/random.h"
#include "kernels/conv/short_conv_backward.h"

namespace kilin {
namespace {

class ShortConv : public ::testing::TestWithParam<Isa> {
 protected:
  void SetUp() override { set_isa(GetParam()); }
  void TearDown() override { set_isa(supported_isas().back()); }
  ThreadPool pool_{2};
};

// The whole input of one sequence at once, in double, with zeros before its first token.
std::vector<double> reference(int64_t tokens, int64_t channels, int64_t taps, const float* u,
                              const float* w) {
  std::vector<double> y(static_cast<size_t>(tokens * channels));
  for (int64_t t = 0; t < tokens; ++t) {
    for (int64_t c = 0; c < channels; ++c) {
      double sum = 0;
      for (int64_t i = 0; i < taps; ++i) {
        const int64_t at = t - taps + 1 + i;
        if (at >= 0) sum += static_cast<double>(w[i * channels + c]) * u[at * channels + c];
      }
      y[static_cast<size_t>(t * channels + c)] = sum / (1 + std::exp(-sum));
    }
  }
  return y;
}

TEST_P(ShortConv, any_split_of_a_sequence_gives_the_same_bits_and_agrees_with_double) {
  for (int64_t taps : {2, 3, 4, 8}) {
    for (int64_t channels : {1, 16, 70, 200}) {
      const int64_t tokens = 37;
      Random random(9);
      std::vector<float> u(static_cast<size_t>(tokens * channels)), w(static_cast<size_t>(taps * channels));
      for (float& v : u) v = static_cast<float>(random.normal());
      for (float& v : w) v = static_cast<float>(random.normal());
      const auto exact = reference(tokens, channels, taps, u.data(), w.data());
      std::vector<float> first;
      for (const std::vector<int32_t>& parts :
           std::vector<std::vector<int32_t>>{{37}, {1, 36}, {2, 0, 3, 1, 31}, {30, 7}}) {
        std::vector<float> y(u.size()), state(static_cast<size_t>(3 * (taps - 1) * channels), 0.0f);
        std::fill_n(state.begin(), (taps - 1) * channels, 9.0f);  // slot 0 belongs to somebody else
        const int32_t slot = 1;
        int64_t at = 0;
        for (int32_t n : parts) {
          const int32_t cu[] = {0, n};
          short_conv({channels, taps, 1, cu, &slot, u.data() + at * channels, channels, w.data(),
                      state.data(), (taps - 1) * channels, y.data() + at * channels, channels},
                     pool_);
          at += n;
        }
        for (size_t i = 0; i < y.size(); ++i)
          ASSERT_NEAR(y[i], exact[i], 1e-6 * (std::abs(exact[i]) + 1)) << taps;
        if (first.empty()) first = y;
        EXPECT_EQ(first, y);
        for (int64_t i = 0; i < (taps - 1) * channels; ++i) {
          ASSERT_EQ(state[static_cast<size_t>(i)], 9.0f);
          ASSERT_EQ(state[static_cast<size_t>((taps - 1) * channels + i)],
                    u[static_cast<size_t>((tokens - taps + 1) * channels + i)]);
        }
      }
    }
  }
}

TEST_P(ShortConv, sequences_of_a_batch_do_not_see_each_other_and_may_work_in_place) {
  const int64_t channels = 24, taps = 4;
  const int32_t cu[] = {0, 5, 5, 6, 16};
  const int32_t slots[] = {2, 0, 3, 1};
  Random random(4);
  std::vector<float> u(16 * 24), w(4 * 24);
  for (float& v : u) v = static_cast<float>(random.normal());
  for (float& v : w) v = static_cast<float>(random.normal());
  std::vector<float> state(4 * 3 * 24, 0.0f), y = u;
  short_conv(
      {channels, taps, 4, cu, slots, y.data(), channels, w.data(), state.data(), 3 * 24, y.data(), channels},
      pool_);
  for (int s = 0; s < 4; ++s) {
    const auto exact = reference(cu[s + 1] - cu[s], channels, taps, u.data() + cu[s] * channels, w.data());
    for (size_t i = 0; i < exact.size(); ++i) {
      ASSERT_NEAR(y[static_cast<size_t>(cu[s] * channels) + i], exact[i], 1e-6 * (std::abs(exact[i]) + 1));
    }
  }
  for (int64_t i = 0; i < 3 * 24; ++i)
    EXPECT_EQ(state[static_cast<size_t>(i)], 0.0f) << "empty sequence's state";
}

// Gradient of sum(y dy) by the formulas in short_conv_backward.h, in double
void reference_gradient(int64_t tokens, int64_t channels, int64_t taps, const float* u, const float* w,
                        const float* dy, double* du, double* dw) {
  for (int64_t t = 0; t < tokens; ++t) {
    for (int64_t c = 0; c < channels; ++c) {
      double z = 0;
      for (int64_t i = std::max<int64_t>(0, taps - 1 - t); i < taps; ++i)
        z += static_cast<double>(w[i * channels + c]) * u[(t - taps + 1 + i) * channels + c];
      const double s = 1 / (1 + std::exp(-z));
      const double dz = dy[t * channels + c] * s * (1 + z * (1 - s));
      for (int64_t i = std::max<int64_t>(0, taps - 1 - t); i < taps; ++i) {
        const int64_t at = (t - taps + 1 + i) * channels + c;
        du[at] += dz * w[i * channels + c];
        dw[i * channels + c] += dz * u[at];
      }
    }
  }
}

TEST_P(ShortConv, gradients_agree_with_double_for_any_number_of_threads) {
  const std::vector<int32_t> cu{0, 1, 1, 20, 22, 59};
  const int64_t tokens = cu.back();
  for (int64_t taps : {2, 3, 4, 8}) {
    for (int64_t channels : {1, 16, 70, 200}) {
      Random random(9);
      const auto values = [&](int64_t n) {
        std::vector<float> x(static_cast<size_t>(n));
        for (float& v : x) v = static_cast<float>(random.normal());
        return x;
      };
      const auto u = values(tokens * channels), dy = values(tokens * channels), w = values(taps * channels);
      std::vector<double> du(u.size()), dw(w.size());
      for (size_t s = 0; s + 1 < cu.size(); ++s) {
        const int64_t at = cu[s] * channels;
        reference_gradient(cu[s + 1] - cu[s], channels, taps, u.data() + at, w.data(), dy.data() + at,
                           du.data() + at, dw.data());
      }
      std::vector<float> first;
      for (int threads : {1, 3}) {
        ThreadPool pool(threads);
        std::vector<float> ours_u(u.size(), 9.0f), ours_w(w.size(), 9.0f);
        short_conv_backward({channels, taps, 5, cu.data(), u.data(), channels, w.data(), dy.data(), channels,
                             ours_u.data(), channels, ours_w.data()},
                            pool);
        for (size_t i = 0; i < du.size(); ++i)
          ASSERT_NEAR(ours_u[i], du[i], 2e-6 * (std::abs(du[i]) + 5)) << taps << " " << channels;
        for (size_t i = 0; i < dw.size(); ++i)
          ASSERT_NEAR(ours_w[i], dw[i], 2e-6 * (std::abs(dw[i]) + 20)) << taps << " " << channels;
        ours_u.insert(ours_u.end(), ours_w.begin(), ours_w.end());
        if (first.empty()) first = ours_u;
        EXPECT_EQ(first, ours_u);
      }
    }
  }
}

TEST(ShortConvArguments, one_tap_is_refused) {
  ThreadPool pool(1);
  ShortConvParams p;
  p.taps = 1;
  EXPECT_THROW(short_conv(p, pool), Error);
}

INSTANTIATE_TEST_SUITE_P(Isa, ShortConv,
                         ::testing::ValuesIn(supported_isas().begin(), supported_isas().end()),
                         [](const auto& test) { return std::string(isa_name(test.param)); });

}  // namespace
}  // namespace kilin
