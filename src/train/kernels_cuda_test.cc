// SPDX-License-Identifier: Apache-2.0
// The autograd functions over CUDA kernels against the same in torch's operations in float64, values and
// gradients. Needs a Hopper GPU and a torch with CUDA (scripts/train-cuda builds it to be carried there).
#include <ATen/ATen.h>
#include <gtest/gtest.h>
#include <torch/csrc/autograd/autograd.h>

#include "train/delta_mix.h"
#include "train/gated_norm.h"
#include "train/short_convolution.h"

namespace kilin::train {
namespace {

using Tensors = std::vector<at::Tensor>;

at::Tensor noise(at::IntArrayRef shape, uint64_t seed, at::ScalarType dtype = at::kBFloat16) {
  at::manual_seed(seed);
  return at::randn(shape, at::TensorOptions(at::kFloat)).to(dtype).to(at::kCUDA);
}

double distance(const at::Tensor& found, const at::Tensor& expected) {
  const at::Tensor a = found.to(at::kDouble), b = expected.to(at::kDouble);
  return ((a - b).norm() / b.norm().clamp_min(1e-30)).item<double>();
}

// Runs `fast` on `inputs` and `exact` on their float64 copies; compares out and all gradients of <out,
// weights>.
void compare(const std::function<at::Tensor(const Tensors&)>& fast,
             const std::function<at::Tensor(const Tensors&)>& exact, const Tensors& inputs,
             const std::vector<std::string>& names, double out_bound, double gradient_bound) {
  Tensors low, high;
  for (const at::Tensor& x : inputs) {
    low.push_back(x.detach().clone().requires_grad_(true));
    high.push_back(x.detach().to(at::kDouble).requires_grad_(true));
  }
  const at::Tensor y = fast(low), expected = exact(high);
  EXPECT_LT(distance(y, expected), out_bound) << "out";
  const at::Tensor weights = noise(y.sizes(), 99);
  const Tensors found = torch::autograd::grad({y}, low, {weights});
  const Tensors right = torch::autograd::grad({expected}, high, {weights.to(at::kDouble)});
  for (size_t i = 0; i < inputs.size(); ++i) {
    EXPECT_LT(distance(found[i], right[i]), gradient_bound) << names[i];
  }
}

// The bounds of /kernels tests: bfloat16 rounds inputs of products to 2^-9 of themselves.
void check_delta_mix(const KdaParams& p, const std::vector<int32_t>& cu) {
  const Sequences s = Sequences::of(cu, at::kCUDA);
  const int64_t rows = cu.back(), H = p.heads, HV = p.value_heads, K = p.key_dim, V = p.value_dim;
  const int64_t gates = p.scalar_gate ? HV : HV * K;
  const Tensors inputs{noise({rows, H * K}, 1),
                       noise({rows, H * K}, 2),
                       noise({rows, HV * V}, 3),
                       noise({rows, gates}, 4),
                       noise({rows, HV}, 5),
                       noise({HV}, 6, at::kFloat) * 0.5,
                       noise({gates}, 7, at::kFloat) - 1.0};
  const auto mix = [&](const Tensors& x) { return DeltaMix{p, x[0], x[1], x[2], x[3], x[4], x[5], x[6]}; };
  compare([&](const Tensors& x) { return delta_mix_cuda(mix(x), s); },
          [&](const Tensors& x) { return delta_mix_composite(mix(x), s); }, inputs,
          {"q", "k", "v", "gate", "beta", "a_log", "dt_bias"}, 0.01, 0.03);
}

KdaParams settings(int heads, int value_heads, int width, KdaGate gate, bool scalar) {
  KdaParams p;
  p.heads = heads;
  p.value_heads = value_heads;
  p.key_dim = p.value_dim = width;
  p.gate_kind = gate;
  p.lower_bound = -5.0f;
  p.scalar_gate = scalar;
  return p;
}

TEST(TrainCuda, delta_rule_of_kda) {
  check_delta_mix(settings(2, 2, 128, KdaGate::kSoftplus, false), {0, 1, 64, 64, 200});
  check_delta_mix(settings(2, 4, 64, KdaGate::kBounded, false), {0, 130});
}

TEST(TrainCuda, delta_rule_of_gdn) {
  check_delta_mix(settings(2, 2, 128, KdaGate::kSoftplus, true), {0, 63, 192});
  check_delta_mix(settings(2, 2, 64, KdaGate::kBounded, true), {0, 65});
}

TEST(TrainCuda, short_convolution) {
  const Sequences s = Sequences::of({0, 1, 3, 3, 100}, at::kCUDA);
  compare([&](const Tensors& x) { return short_convolution_cuda(x[0], x[1], s).value(); },
          [&](const Tensors& x) { return short_convolution(x[0], x[1], s); },
          {noise({100, 256}, 1), noise({256, 1, 4}, 2, at::kFloat)}, {"x", "w"}, 0.005, 0.01);
}

TEST(TrainCuda, gated_norm) {
  for (const GateActivation activation :
       {GateActivation::kNone, GateActivation::kSigmoid, GateActivation::kSilu}) {
    const auto exact = [&](const Tensors& x) {
      const at::Tensor y = at::rms_norm(x[0].view({77, 3, 128}), {128}, x[1], 1e-5).view({77, 384});
      if (activation == GateActivation::kNone) return y;
      return y * (activation == GateActivation::kSilu ? at::silu(x[2]) : at::sigmoid(x[2]));
    };
    const auto fast = [&](const Tensors& x) {
      return gated_norm_cuda(x[0], x[1], 1e-5, activation == GateActivation::kNone ? nullptr : &x[2],
                             activation)
          .value();
    };
    Tensors inputs{noise({77, 384}, 1), noise({128}, 2, at::kFloat)};
    std::vector<std::string> names{"x", "w"};
    if (activation != GateActivation::kNone) {
      inputs.push_back(noise({77, 384}, 3));
      names.emplace_back("z");
    }
    compare(fast, exact, inputs, names, 0.005, 0.01);
  }
}

}  // namespace
}  // namespace kilin::train
