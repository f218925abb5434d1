// SPDX-License-Identifier: Apache-2.0
// The gated RMSNorm on the GPU against plain loops in double.
#include "kernels/norm/norm_cuda.h"

#include <gtest/gtest.h>

#include "base/random.h"
#include "kernels/cuda/gpu_test.h"

namespace kilin {
namespace {

struct Case {
  int64_t tokens = 1;
  int heads = 1, width = 128;
  CudaType type = CudaType::kBf16, weight_type = CudaType::kBf16;
  GateActivation activation = GateActivation::kSigmoid;
  bool weight = true;
};

class Problem {
 public:
  explicit Problem(const Case& wanted) : c_(wanted) {
    Random random(5);
    const auto fill = [&](int64_t count, double mean, double deviation) {
      std::vector<double> values(static_cast<size_t>(count));
      for (double& x : values) x = mean + deviation * random.normal();
      return values;
    };
    const int64_t size = c_.tokens * stride();
    x_ = TypedArray(c_.type, fill(size, 0.1, 1));
    z_ = TypedArray(c_.type, fill(size, 0, 2));
    dy_ = TypedArray(c_.type, fill(size, 0, 1));
    weight_ = TypedArray(c_.weight_type, fill(c_.width, 1, 0.3));
    y_ = TypedArray(c_.type, std::vector<double>(size, 77));
    dx_ = TypedArray(c_.type, std::vector<double>(size, 77));
    dz_ = TypedArray(c_.type, std::vector<double>(size, 77));
    d_weight_ = GpuArray<float>(std::vector<float>(c_.width, 1e30f));
  }

  GatedNormCudaParams params() const {
    GatedNormCudaParams p;
    p.tokens = c_.tokens, p.heads = c_.heads, p.width = c_.width, p.type = c_.type;
    p.x = {x_.data(), stride()}, p.activation = c_.activation;
    if (c_.activation != GateActivation::kNone) p.z = {z_.data(), stride()};
    if (c_.weight) p.weight = weight_.data();
    p.weight_type = c_.weight_type;
    p.y = y_.data(), p.y_stride = stride();
    return p;
  }

  void check_run() {
    SCOPED_TRACE(fmt::format("{} x {} x {}, activation {}", c_.tokens, c_.heads, c_.width,
                             static_cast<int>(c_.activation)));
    std::vector<double> y = y_.values(), dx = y, dz = y, dw(c_.width, 0.0);
    for (int64_t row = 0; row < c_.tokens * c_.heads; ++row) {
      const int64_t at = row / c_.heads * stride() + row % c_.heads * c_.width;
      double squares = 0;
      for (int i = 0; i < c_.width; ++i) squares += x_[at + i] * x_[at + i];
      const double r = 1 / std::sqrt(squares / c_.width + 1e-5f);
      double product = 0;
      for (int i = 0; i < c_.width; ++i) {
        const double n = x_[at + i] * r;
        y[at + i] = n * w(i) * value(z_[at + i]);
        dz[at + i] = dy_[at + i] * w(i) * n * slope(z_[at + i]);
        dw[i] += dy_[at + i] * n * value(z_[at + i]);
        product += dy_[at + i] * w(i) * value(z_[at + i]) * n;
      }
      for (int i = 0; i < c_.width; ++i) {
        dx[at + i] = r * (dy_[at + i] * w(i) * value(z_[at + i]) - x_[at + i] * r * product / c_.width);
      }
    }
    gated_rms_norm_cuda(params(), nullptr);
    run_backward();
    const double limit = c_.type == CudaType::kBf16 ? 2.5e-3 : 4e-4;
    const bool gated = c_.activation != GateActivation::kNone;
    EXPECT_LT(relative_error(y_.now(), y), limit) << worst(y_.now(), y);
    EXPECT_LT(relative_error(dx_.now(), dx), limit) << worst(dx_.now(), dx);
    const std::vector<double>& expected_dz = gated ? dz : dz_.values();
    EXPECT_LT(relative_error(dz_.now(), expected_dz), gated ? limit : 1e-30) << worst(dz_.now(), expected_dz);
    const std::vector<float> weights = d_weight_.host();
    const std::vector<double> got(weights.begin(), weights.end());
    EXPECT_LT(relative_error(got, dw), 2e-5) << worst(got, dw);
  }

  void run_backward() {
    GatedNormCudaBackward b;
    b.forward = params();
    b.dy = {dy_.data(), stride()};
    b.dx = dx_.data(), b.dx_stride = stride(), b.dz = dz_.data(), b.dz_stride = stride();
    b.d_weight = d_weight_.data();
    const GpuArray<uint8_t> workspace(std::vector<uint8_t>(gated_rms_norm_backward_cuda_workspace(b), 0xff));
    gated_rms_norm_backward_cuda(b, workspace.data(), workspace.size(), nullptr);
    check_cuda(cudaDeviceSynchronize(), "gated_rms_norm_backward");
  }
  std::vector<float> d_weight() const { return d_weight_.host(); }

 private:
  int64_t stride() const { return static_cast<int64_t>(c_.heads) * c_.width + 8; }
  double w(int i) const { return c_.weight ? weight_[i] : 1; }
  double value(double z) const {
    const double s = 1 / (1 + std::exp(-z));
    return c_.activation == GateActivation::kNone ? 1 : c_.activation == GateActivation::kSigmoid ? s : z * s;
  }
  double slope(double z) const {
    const double s = 1 / (1 + std::exp(-z));
    return c_.activation == GateActivation::kSigmoid ? s * (1 - s) : s * (1 + z * (1 - s));
  }

  Case c_;
  TypedArray x_, z_, dy_, weight_, y_, dx_, dz_;
  GpuArray<float> d_weight_;
};

class GatedNormCuda : public GpuTest {};

TEST_F(GatedNormCuda, EveryVariantAgreesWithDouble) {
  using A = GateActivation;
  for (const A activation : {A::kNone, A::kSigmoid, A::kSilu}) {
    for (const int width : {64, 128, 256}) {
      Problem({.tokens = 37, .heads = 3, .width = width, .activation = activation}).check_run();
    }
  }
  Problem({.tokens = 1, .heads = 1}).check_run();
  Problem({.tokens = 5, .heads = 32, .type = CudaType::kF16, .weight_type = CudaType::kF16}).check_run();
  Problem({.tokens = 9, .heads = 2, .weight_type = CudaType::kF32}).check_run();
  Problem({.tokens = 9, .heads = 2, .weight = false}).check_run();
  Problem({.tokens = 3001, .heads = 12}).check_run();
}

TEST_F(GatedNormCuda, SmallForwardAndBackward) { Problem({.tokens = 5, .heads = 3}).check_run(); }

TEST_F(GatedNormCuda, GradientsHaveTheSameBitsEveryTime) {
  Problem problem({.tokens = 3001, .heads = 12});
  problem.run_backward();
  const std::vector<float> first = problem.d_weight();
  for (int i = 0; i < 100; ++i) {
    problem.run_backward();
    ASSERT_EQ(problem.d_weight(), first) << i;
  }
}

}  // namespace
}  // namespace kilin
