// SPDX-License-Identifier: Apache-2.0
#include "train/optimizer.h"

#include <ATen/ATen.h>
#include <c10/core/GradMode.h>

#include <algorithm>
#include <cmath>
#include <map>

#include "base/error.h"

namespace kilin::train {
namespace {

constexpr double kA = 3.4445, kB = -4.7750, kC = 2.0315;
constexpr int kNewtonSchulzSteps = 5;
constexpr double kMuonRms = 0.2;                      // of the entries of an update, as AdamW's are about
constexpr int64_t kBatchElements = int64_t{1} << 26;  // of matrices that are orthogonalised together

bool is_matrix(Role role) { return role != Role::kVector && role != Role::kConv; }

bool for_muon(Role role) {
  return role == Role::kProjection || role == Role::kExpert || role == Role::kRouter;
}

}  // namespace

at::Tensor orthogonalize(const at::Tensor& given) {
  const bool tall = given.size(-2) > given.size(-1);
  at::Tensor x = given.is_cuda() ? given.to(at::kBFloat16) : given;
  if (tall) x = x.transpose(-2, -1);
  x = x / (x.norm(2, {-2, -1}, /*keepdim=*/true) + 1e-7);
  for (int i = 0; i < kNewtonSchulzSteps; ++i) {
    const at::Tensor gram = at::matmul(x, x.transpose(-2, -1));
    const at::Tensor polynomial = at::baddbmm(gram, gram, gram, kB, kC);
    x = at::baddbmm(x, polynomial, x, kA, 1.0);
  }
  if (tall) x = x.transpose(-2, -1);
  return x.to(given.scalar_type());
}

Optimizer::Optimizer(const OptimizerConfig& config, const std::vector<NamedTensor>& parameters)
    : config_(config) {
  int64_t elements = 0;
  for (const NamedTensor& p : parameters) {
    if (!p.tensor.requires_grad()) continue;
    trained_.push_back(p);
    elements += p.tensor.numel();
  }
  KILIN_ASSERT(!trained_.empty());
  const c10::NoGradGuard no_grad;
  const at::TensorOptions options = trained_.front().tensor.options().requires_grad(false);
  gradients_ = at::zeros({elements}, options);
  step_ = at::zeros({}, options.dtype(at::kFloat));
  std::map<std::vector<int64_t>, size_t> by_shape;
  int64_t offset = 0;
  for (NamedTensor& p : trained_) {
    const at::IntArrayRef sizes = p.tensor.sizes();
    const at::Tensor gradient = gradients_.narrow(0, offset, p.tensor.numel()).view(sizes);
    offset += p.tensor.numel();
    p.tensor.mutable_grad() = gradient;
    const bool muon = config.kind == OptimizerKind::kMuon && for_muon(p.role);
    by_muon_.push_back(muon);
    first_.push_back(at::zeros(sizes, options));
    second_.push_back(muon ? at::Tensor() : at::zeros(sizes, options));
    if (muon) {
      const auto [found, added] = by_shape.try_emplace(sizes.vec(), matrices_.size());
      if (added) matrices_.emplace_back();
      Matrices& group = matrices_[found->second];
      group.parameters.push_back(p.tensor);
      group.gradients.push_back(gradient);
      group.momenta.push_back(first_.back());
      // A group that is too large to be worked on at once is closed; the next matrix opens another.
      if (static_cast<int64_t>(group.parameters.size() + 1) * p.tensor.numel() > kBatchElements)
        by_shape.erase(found);
      continue;
    }
    Group& group = config.decay_all || is_matrix(p.role) ? decayed_ : plain_;
    group.parameters.push_back(p.tensor);
    group.gradients.push_back(gradient);
    group.first.push_back(first_.back());
    group.second.push_back(second_.back());
  }
}

double Optimizer::clip_gradients() {
  const double norm = gradients_.norm().item<double>();
  if (config_.clip > 0 && norm > config_.clip) gradients_.mul_(config_.clip / (norm + 1e-6));
  return norm;
}

void Optimizer::step(double rate) {
  const c10::NoGradGuard no_grad;
  ++updates_;
  step_.fill_(static_cast<double>(updates_));
  adamw(decayed_, rate, config_.weight_decay);
  adamw(plain_, rate, 0);
  for (const Matrices& matrices : matrices_) muon(matrices, rate);
}

void Optimizer::adamw(const Group& group, double rate, double weight_decay) {
  if (group.parameters.empty()) return;
  const std::vector<at::Tensor> steps(group.parameters.size(), step_);
  at::_fused_adamw_(group.parameters, group.gradients, group.first, group.second, {}, steps, rate,
                    config_.beta1, config_.beta2, weight_decay, config_.epsilon, /*amsgrad=*/false,
                    /*maximize=*/false);
}

void Optimizer::muon(const Matrices& matrices, double rate) const {
  at::_foreach_mul_(matrices.momenta, config_.momentum);
  at::_foreach_add_(matrices.momenta, matrices.gradients);
  const at::Tensor nesterov =
      at::stack(matrices.gradients).add_(at::stack(matrices.momenta), config_.momentum);
  const at::Tensor update = orthogonalize(nesterov);
  const double larger = static_cast<double>(std::max(update.size(-2), update.size(-1)));
  at::_foreach_mul_(matrices.parameters, 1 - rate * config_.weight_decay);
  at::_foreach_add_(matrices.parameters, update.unbind(), -rate * kMuonRms * std::sqrt(larger));
}

std::vector<std::pair<std::string, at::Tensor>> Optimizer::state() const {
  std::vector<std::pair<std::string, at::Tensor>> result;
  for (size_t i = 0; i < trained_.size(); ++i) {
    result.emplace_back((by_muon_[i] ? "momentum." : "first.") + trained_[i].name, first_[i]);
    if (!by_muon_[i]) result.emplace_back("second." + trained_[i].name, second_[i]);
  }
  return result;
}

}  // namespace kilin::train
