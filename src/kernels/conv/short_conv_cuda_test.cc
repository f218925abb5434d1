// SPDX-License-Identifier: Apache-2.0
// The short convolution on the GPU against plain loops in double; gradients against the transposed loops.
#include "kernels/conv/short_conv_cuda.h"

#include <gtest/gtest.h>

#include <numeric>

#include "base/random.h"
#include "kernels/cuda/gpu_test.h"

namespace kilin {
namespace {

struct Case {
  const char* name = "";
  int64_t channels = 64;
  std::vector<int> lengths = {1};
  int taps = 4;
  CudaType type = CudaType::kBf16, weight_type = CudaType::kBf16;
  bool silu = true, initial = true, wide = false;
  int padded = -1;  // this sequence has slot -1
};

std::vector<double> normals(Random& random, int64_t count, double deviation) {
  std::vector<double> values(static_cast<size_t>(count));
  for (double& x : values) x = deviation * random.normal();
  return values;
}

// A problem, its reference in double, and the gradients for random dy and d_final.
class Problem {
 public:
  explicit Problem(const Case& wanted) : c_(wanted) {
    Random random(7);
    std::vector<int32_t> cu{0};
    for (int length : c_.lengths) cu.push_back(cu.back() + length);
    tokens_ = cu.back();
    const int n = static_cast<int>(c_.lengths.size());
    std::vector<int32_t> slots;
    for (int i = 0; i < n; ++i) slots.push_back(i == c_.padded ? -1 : 2 * (n - i));
    slots_ = slots;
    u_ = TypedArray(c_.type, normals(random, tokens_ * stride(), 1));
    dy_ = TypedArray(c_.type, normals(random, tokens_ * c_.channels, 1));
    weight_ = TypedArray(c_.weight_type, normals(random, c_.channels * c_.taps, 0.6));
    const int64_t pool = (2 * n + 2) * slot_stride();
    states_ = TypedArray(c_.type, normals(random, pool, 1));
    d_final_ = TypedArray(c_.type, normals(random, pool, 1));
    d_initial_ = TypedArray(c_.type, std::vector<double>(pool, 6e4));
    y_ = TypedArray(c_.type, std::vector<double>(tokens_ * stride(), 77));
    du_ = TypedArray(c_.type, std::vector<double>(tokens_ * stride(), 77));
    d_weight_ = GpuArray<float>(std::vector<float>(c_.channels * c_.taps, 1e30f));
    device_slots_ = GpuArray<int32_t>(slots);
    cu_ = GpuArray<int32_t>(cu);
    wide_cu_ = GpuArray<int64_t>(std::vector<int64_t>(cu.begin(), cu.end()));
  }

  ShortConvCudaParams params() const {
    ShortConvCudaParams p;
    p.channels = c_.channels, p.taps = c_.taps, p.sequences = static_cast<int>(c_.lengths.size());
    p.tokens = tokens_;
    p.cu_seqlens = c_.wide ? static_cast<void*>(wide_cu_.data()) : cu_.data(), p.wide_seqlens = c_.wide;
    p.type = c_.type, p.u = {u_.data(), stride()};
    p.weight = weight_.data(), p.weight_type = c_.weight_type, p.silu = c_.silu;
    if (c_.initial) p.initial = {states_.data(), slot_stride(), device_slots_.data()};
    p.final = {states_.data(), slot_stride(), device_slots_.data()};
    p.y = y_.data(), p.y_stride = stride();
    return p;
  }

  void check_forward(bool update = false) {
    SCOPED_TRACE(c_.name);
    std::vector<double> y = y_.values();
    std::vector<double> states = states_.values();
    for_tokens([&](int n, int64_t begin, int64_t t, int64_t c) {
      double sum = 0;
      for (int i = 0; i < c_.taps; ++i) sum += w(c, i) * input(n, begin, t - c_.taps + 1 + i, c);
      y[(begin + t) * stride() + c] = c_.silu ? sum / (1 + std::exp(-sum)) : sum;
    });
    int64_t begin = 0;
    for (size_t n = 0; n < slots_.size(); begin += c_.lengths[n++]) {
      for (int i = 0; i < c_.taps - 1 && slots_[n] >= 0; ++i) {
        for (int64_t c = 0; c < c_.channels; ++c) {
          states[slots_[n] * slot_stride() + i * c_.channels + c] =
              input(static_cast<int>(n), begin, c_.lengths[n] - c_.taps + 1 + i, c);
        }
      }
    }
    ShortConvCudaParams p = params();
    if (update) {
      p.cu_seqlens = nullptr;
      short_conv_update_cuda(p, nullptr);
    } else {
      short_conv_cuda(p, nullptr);
    }
    const std::vector<double> got = y_.now();
    EXPECT_LT(relative_error(got, y), limit()) << worst(got, y);
    expect_close(got, y);
    EXPECT_EQ(states_.now(), states) << worst(states_.now(), states);
  }

  void check_backward() {
    SCOPED_TRACE(c_.name);
    std::vector<double> du(tokens_ * stride(), 77);
    std::vector<double> dw(c_.channels * c_.taps, 0), d_initial = d_initial_.values();
    for_tokens([&](int, int64_t begin, int64_t t, int64_t c) { du[(begin + t) * stride() + c] = 0; });
    std::vector<std::vector<double>> front(slots_.size(),
                                           std::vector<double>((c_.taps - 1) * c_.channels, 0.0));
    const auto add = [&](int n, int64_t begin, int64_t t, int64_t c, double value) {
      (t >= 0 ? du[(begin + t) * stride() + c] : front[n][(t + c_.taps - 1) * c_.channels + c]) += value;
    };
    for_tokens([&](int n, int64_t begin, int64_t t, int64_t c) {
      double sum = 0;
      for (int i = 0; i < c_.taps; ++i) sum += w(c, i) * input(n, begin, t - c_.taps + 1 + i, c);
      const double s = 1 / (1 + std::exp(-sum));
      const double d = dy_[(begin + t) * c_.channels + c] * (c_.silu ? s * (1 + sum * (1 - s)) : 1);
      for (int i = 0; i < c_.taps; ++i) {
        const int64_t at = t - c_.taps + 1 + i;
        dw[c * c_.taps + i] += d * input(n, begin, at, c);
        add(n, begin, at, c, d * w(c, i));
      }
    });
    int64_t begin = 0;
    for (size_t n = 0; n < slots_.size(); begin += c_.lengths[n++]) {
      if (slots_[n] < 0) continue;
      for (int i = 0; i < c_.taps - 1; ++i) {
        for (int64_t c = 0; c < c_.channels; ++c) {
          add(static_cast<int>(n), begin, c_.lengths[n] - c_.taps + 1 + i, c,
              d_final_[slots_[n] * slot_stride() + i * c_.channels + c]);
        }
      }
      std::copy(front[n].begin(), front[n].end(), d_initial.begin() + slots_[n] * slot_stride());
    }
    run_backward();
    const std::vector<double> got = du_.now();
    EXPECT_LT(relative_error(got, du), limit()) << worst(got, du);
    expect_close(got, du);
    const std::vector<float> weights = d_weight_.host();
    const std::vector<double> got_weights(weights.begin(), weights.end());
    EXPECT_LT(relative_error(got_weights, dw), 2e-5) << worst(got_weights, dw);
    expect_close(d_initial_.now(), d_initial);
  }

  void run_backward() {
    ShortConvCudaBackward b;
    b.forward = params();
    b.dy = {dy_.data(), c_.channels};
    b.d_final = {d_final_.data(), slot_stride(), device_slots_.data()};
    b.du = du_.data(), b.du_stride = stride();
    b.d_weight = d_weight_.data();
    b.d_initial = {d_initial_.data(), slot_stride(), device_slots_.data()};
    const GpuArray<uint8_t> workspace(std::vector<uint8_t>(short_conv_backward_cuda_workspace(b), 0xff));
    short_conv_backward_cuda(b, workspace.data(), workspace.size(), nullptr);
    check_cuda(cudaDeviceSynchronize(), "short_conv_backward");
  }
  std::vector<uint8_t> gradient_bytes() const {
    std::vector<uint8_t> all = du_.bytes();
    const std::vector<float> weights = d_weight_.host();
    all.insert(all.end(), reinterpret_cast<const uint8_t*>(weights.data()),
               reinterpret_cast<const uint8_t*>(weights.data() + weights.size()));
    return all;
  }

 private:
  int64_t stride() const { return c_.channels + 16; }
  int64_t slot_stride() const { return (c_.taps - 1) * c_.channels + 8; }
  double limit() const { return c_.type == CudaType::kBf16 ? 2.5e-3 : 4e-4; }
  double w(int64_t c, int i) const { return weight_[c * c_.taps + i]; }
  double input(int n, int64_t begin, int64_t t, int64_t c) const {
    if (t >= 0) return u_[(begin + t) * stride() + c];
    if (!c_.initial || slots_[n] < 0) return 0;
    return states_[slots_[n] * slot_stride() + (t + c_.taps - 1) * c_.channels + c];
  }
  template <class F>
  void for_tokens(const F& f) const {
    int64_t begin = 0;
    for (size_t n = 0; n < slots_.size(); begin += c_.lengths[n++]) {
      for (int64_t t = 0; t < c_.lengths[n]; ++t) {
        for (int64_t c = 0; c < c_.channels; ++c) f(static_cast<int>(n), begin, t, c);
      }
    }
  }
  // Every value on its own: an error at one boundary must not hide in the norm.
  void expect_close(const std::vector<double>& got, const std::vector<double>& expected) const {
    for (size_t i = 0; i < got.size(); ++i) {
      ASSERT_NEAR(got[i], expected[i], 1e-3 + 2 * limit() * std::abs(expected[i])) << i;
    }
  }

  Case c_;
  int64_t tokens_ = 0;
  std::vector<int32_t> slots_;
  TypedArray u_, dy_, weight_, states_, d_final_, d_initial_, y_, du_;
  GpuArray<float> d_weight_;
  GpuArray<int32_t> device_slots_, cu_;
  GpuArray<int64_t> wide_cu_;
};

class ShortConvCuda : public GpuTest {};

const std::vector<Case>& cases() {
  constexpr CudaType f32 = CudaType::kF32, f16 = CudaType::kF16;
  static const std::vector<Case> all = {
      {.name = "one token"},
      {.name = "lengths", .channels = 72, .lengths = {1, 5, 0, 2, 40, 3, 0}},
      {.name = "wide", .lengths = {7, 9}, .wide = true},
      {.name = "zeros in front", .lengths = {2, 30, 1}, .initial = false},
      {.name = "padding", .lengths = {4, 20, 2}, .padded = 1},
      {.name = "no silu", .lengths = {33}, .silu = false},
      {.name = "3 taps", .lengths = {1, 18, 0, 2}, .taps = 3},
      {.name = "2 taps", .lengths = {1, 18, 0, 2}, .taps = 2},
      {.name = "fp16", .lengths = {3, 50}, .type = f16, .weight_type = f16},
      {.name = "fp32 weights", .channels = 1032, .lengths = {3, 50}, .weight_type = f32},
      {.name = "long", .channels = 128, .lengths = {1000, 1, 517}},
      {.name = "many", .channels = 2048, .lengths = {300, 300, 1, 2, 3, 299}},
  };
  return all;
}

TEST_F(ShortConvCuda, ForwardAgreesWithDouble) {
  for (const Case& wanted : cases()) Problem(wanted).check_forward();
}

TEST_F(ShortConvCuda, UpdateAgreesWithDouble) {
  for (Case wanted : cases()) {
    if (!wanted.initial) continue;
    wanted.lengths.assign(wanted.lengths.size(), 1);
    Problem(wanted).check_forward(true);
  }
}

TEST_F(ShortConvCuda, BackwardAgreesWithDouble) {
  for (const Case& wanted : cases()) Problem(wanted).check_backward();
}

TEST_F(ShortConvCuda, SmallForwardAndBackward) {
  for (int i = 0; i < 2; ++i) {
    Problem(cases()[i]).check_forward();
    Problem(cases()[i]).check_backward();
  }
}

TEST_F(ShortConvCuda, GradientsHaveTheSameBitsEveryTime) {
  Problem problem(cases().back());
  std::vector<uint8_t> first;
  for (int i = 0; i < 100; ++i) {
    problem.run_backward();
    if (i == 0) first = problem.gradient_bytes();
    ASSERT_EQ(problem.gradient_bytes(), first) << i;
  }
}

}  // namespace
}  // namespace kilin
