// SPDX-License-Identifier: Apache-2.0
#include "train/torch_model.h"

#include <ATen/ATen.h>
#include <c10/core/GradMode.h>

#include <cmath>

#include "base/error.h"
#include "model/blocks.h"
#include "model/config_text.h"
#include "model/stored_model.h"
#include "model/stored_parameter.h"
#include "train/initial_values.h"
#include "train/torch_model_impl.h"

namespace kilin::train {
namespace {

// The experts of a layer as parts of two tensors, in which grouped products can take them.
void stack_experts(const Config& c, const at::TensorOptions& options, MoeWeights<TorchWeight>& w) {
  const MoeConfig& m = c.moe;
  const at::Tensor gate_up = at::zeros({m.experts, 2 * m.width, c.hidden}, options);
  const at::Tensor down = at::zeros({m.experts, c.hidden, m.width}, options);
  for (size_t e = 0; e < w.experts.size(); ++e) {
    const at::Tensor both = gate_up.select(0, static_cast<int64_t>(e));
    w.experts[e].gate.value = both.narrow(0, 0, m.width);
    w.experts[e].up.value = both.narrow(0, m.width, m.width);
    w.experts[e].down.value = down.select(0, static_cast<int64_t>(e));
  }
}

bool is_router_bias(const std::string& name) { return name.ends_with(".e_score_correction_bias"); }

void check_options(const ModelOptions& options) {
  check(options.dtype == at::kFloat || options.dtype == at::kDouble,
        "training: parameters of type {}, expected float32 or float64", c10::toString(options.dtype));
  check(!options.autocast_bf16 || options.dtype == at::kFloat,
        "training: bfloat16 products go with float32 parameters, found float64");
}

}  // namespace

TorchModel::Impl::Impl(const Config& c, const ModelOptions& o)
    : config(c), options(o), weights(config), leaves(config.layers.size()), ops(config, options) {
  check_options(options);
  const auto type = at::TensorOptions(options.dtype).device(options.device);
  for (size_t i = 0; i < weights.layers.size(); ++i) {
    if (config.sparse[i]) stack_experts(config, type, weights.layers[i].moe);
  }
  visit([&](const Parameter& p, TorchWeight& w) {
    // A leaf with its own gradient, though it may be a part of a larger tensor
    w.value = w.value.defined() ? w.value.detach() : at::zeros(p.shape, type);
    parameters.push_back({p.name, w.value, p.role, p.shape});
  });
  set_trainable();
}

void TorchModel::Impl::set(size_t i, const std::vector<float>& values) {
  const c10::NoGradGuard no_gradients;
  const NamedTensor& p = parameters[i];
  const at::Tensor stored = at::from_blob(const_cast<float*>(values.data()), p.shape, at::kFloat);
  p.tensor.detach().copy_(stored);
}

void TorchModel::Impl::set_trainable() {
  const bool frozen = !lora.empty();
  for (NamedTensor& p : parameters) p.tensor.requires_grad_(!frozen && !is_router_bias(p.name));
  for (auto& list : leaves) list.clear();
  visit([&](const Parameter& p, TorchWeight& w) {
    const std::string prefix = "model.layers.";
    if (!p.name.starts_with(prefix)) return;
    auto& list = leaves[std::stoul(p.name.substr(prefix.size()))];
    for (const at::Tensor& t : {w.value, w.lora_a, w.lora_b}) {
      if (t.defined() && t.requires_grad()) list.push_back(t);
    }
  });
}

TorchModel::TorchModel(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
TorchModel::TorchModel(TorchModel&&) noexcept = default;
TorchModel& TorchModel::operator=(TorchModel&&) noexcept = default;
TorchModel::~TorchModel() = default;

TorchModel TorchModel::random(const Config& config, uint64_t seed, const ModelOptions& options) {
  auto impl = std::make_unique<Impl>(config, options);
  impl->text = config_text(config, "float32");
  size_t i = 0;
  impl->visit([&](const Parameter& p, TorchWeight&) { impl->set(i++, initial_values(p, seed)); });
  return TorchModel(std::move(impl));
}

TorchModel TorchModel::load(const std::string& path, const ModelOptions& options) {
  const StoredModel stored = StoredModel::open(path, options.compatibility);
  auto impl = std::make_unique<Impl>(stored.config, options);
  impl->text = stored.config_text;
  for (size_t i = 0; i < stored.parameters.size(); ++i) {
    const auto parameter = StoredParameter::find(stored.checkpoint, stored.parameters[i], stored.config);
    std::vector<float> values(static_cast<size_t>(parameter.elements()));
    parameter.read(0, parameter.elements(), values.data());
    for (const float x : values) check(std::isfinite(x), "{}: holds NaN or infinity", parameter.place());
    impl->set(i, values);
  }
  return TorchModel(std::move(impl));
}

at::Tensor TorchModel::forward(const TrainBatch& batch) {
  TorchOps& ops = impl_->ops;
  ops.begin(batch, c10::GradMode::is_enabled());
  ops.set_leaves(&impl_->leaves);
  const at::Tensor logits = model_forward(ops, impl_->config, impl_->weights);
  return logits.to(impl_->options.dtype);
}

const Config& TorchModel::config() const { return impl_->config; }
const ModelOptions& TorchModel::options() const { return impl_->options; }
const std::vector<NamedTensor>& TorchModel::parameters() const { return impl_->parameters; }
bool TorchModel::has_lora() const { return !impl_->lora.empty(); }
const std::vector<NamedTensor>& TorchModel::lora_parameters() const { return impl_->lora; }

std::vector<RouterCounts>& TorchModel::router_counts() { return impl_->ops.router_counts(); }

void TorchModel::reset_router_counts() {
  for (RouterCounts& layer : router_counts()) layer.counts.zero_();
}

void TorchModel::update_router_bias(double rate) {
  const c10::NoGradGuard no_gradients;
  for (const RouterCounts& layer : router_counts()) {
    const at::Tensor counts = layer.counts.to(at::kDouble);
    const at::Tensor sign = at::sign(counts.mean() - counts);
    const at::Tensor& bias = impl_->weights.layers[static_cast<size_t>(layer.layer)].moe.router_bias.value;
    bias.detach().add_(sign.view(bias.sizes()).to(bias.dtype()), rate);
  }
  reset_router_counts();
}

}  // namespace kilin::train
