// SPDX-License-Identifier: Apache-2.0
#include "train/torch_ops.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <cmath>

#include "base/error.h"
#include "model/blocks.h"
#include "train/delta_mix.h"
#include "train/gated_norm.h"
#include "train/notice.h"
#include "train/recompute.h"
#include "train/short_convolution.h"

namespace kilin::train {
namespace {

void check_lengths(const std::vector<int32_t>& cu, int64_t rows) {
  check(cu.size() >= 2, "training batch: found no sequence, expected at least one");
  check(cu.front() == 0 && cu.back() == rows,
        "training batch: cu_seqlens go from {} to {}, expected 0 to {} (the number of tokens)", cu.front(),
        cu.back(), rows);
  check(std::is_sorted(cu.begin(), cu.end()), "training batch: cu_seqlens fall, expected rising offsets");
}

void check_range(const at::Tensor& values, int64_t below, const char* what) {
  if (values.numel() == 0) return;
  const auto low = values.min().item<int64_t>();
  const auto high = values.max().item<int64_t>();
  check(low >= 0 && high < below, "training batch: {}: found {}, expected 0 to {}", what,
        low < 0 ? low : high, below - 1);
}

}  // namespace

TorchOps::TorchOps(const Config& config, const ModelOptions& options) : config_(config), options_(options) {
  for (size_t i = 0; i < config.sparse.size(); ++i) {
    if (!config.sparse[i]) continue;
    counts_.push_back({static_cast<int>(i),
                       at::zeros({config.moe.experts}, at::TensorOptions(at::kLong).device(options.device))});
  }
}

void TorchOps::begin(const TrainBatch& batch, bool count) {
  check(batch.tokens.defined() && batch.tokens.dim() == 1 && batch.tokens.scalar_type() == at::kLong,
        "training batch: tokens must be an int64 tensor of one dimension");
  const int64_t rows = batch.tokens.size(0);
  check_lengths(batch.cu_seqlens, rows);
  check(rows > 0, "training batch: found no tokens, expected at least one");
  check_range(batch.tokens, config_.vocab_size, "token ids");
  if (batch.wanted.defined()) {
    check(batch.wanted.dim() == 1 && batch.wanted.scalar_type() == at::kLong,
          "training batch: wanted must be an int64 tensor of one dimension");
    check_range(batch.wanted, rows, "wanted rows");
  }
  tokens_ = batch.tokens.to(options_.device);
  wanted_ = batch.wanted.defined() ? batch.wanted.to(options_.device) : at::Tensor();
  if (sequences_.cu != batch.cu_seqlens) sequences_ = Sequences::of(batch.cu_seqlens, options_.device);
  count_ = count;
  cast_from_ = cast_to_ = Tensor();
}

at::Tensor TorchOps::operand(const Tensor& x) const {
  return options_.autocast_bf16 ? x.to(at::kBFloat16) : x;
}

at::Tensor TorchOps::shared_operand(const Tensor& x) {
  if (!options_.autocast_bf16 || x.scalar_type() == at::kBFloat16) return operand(x);
  if (!cast_from_.is_same(x)) {
    cast_to_ = operand(x);
    cast_from_ = x;
  }
  return cast_to_;
}

at::Tensor TorchOps::exact(const Tensor& x) const { return x.to(options_.dtype); }

at::Tensor TorchOps::product(const Tensor& x, const Weight& w) const {
  Tensor y = at::linear(x, operand(w.value));
  if (!w.lora_a.defined()) return y;
  const Tensor low = at::linear(x, operand(w.lora_a));
  return y + w.lora_scale * at::linear(low, operand(w.lora_b));
}

at::Tensor TorchOps::embed(const Weight& table) { return at::embedding(table.value, tokens_); }

// w * x / sqrt(mean x^2 + eps) over the last dimension
at::Tensor TorchOps::normalized(const Tensor& x, const Tensor& w, double eps) const {
  return at::rms_norm(exact(x), {x.size(-1)}, w, eps);
}

at::Tensor TorchOps::rms_norm(const Tensor& x, const Weight& w, double eps) {
  return normalized(x, w.value, eps);
}

at::Tensor TorchOps::short_conv(const Tensor& x, const Weight* w, int, ConvStream) {
  if (w == nullptr) return at::silu(x);
  if (x.is_cuda()) {
    if (auto y = short_convolution_cuda(x, w->value, sequences_)) return *y;
  }
  return short_convolution(x, w->value, sequences_);
}

at::Tensor TorchOps::delta_mix(const MixInputs<Tensor, Weight>& in, int, LayerKind kind) {
  const LinearAttentionConfig& c = config_.linear;
  KdaParams p;
  p.heads = static_cast<int>(c.heads);
  p.value_heads = static_cast<int>(c.value_heads);
  p.key_dim = static_cast<int>(c.key_dim);
  p.value_dim = static_cast<int>(c.value_dim);
  p.gate_kind = c.gate_lower_bound ? KdaGate::kBounded : KdaGate::kSoftplus;
  p.lower_bound = static_cast<float>(c.gate_lower_bound.value_or(-5.0));
  p.scalar_gate = kind == LayerKind::kGdn;
  const Tensor a_log = in.a_log.value.reshape({-1});
  const bool kernel = options_.kda_path == KdaPath::kKernel && options_.dtype == at::kFloat;
  if (kernel && options_.device.is_cuda()) {
    const std::string obstacle = options_.autocast_bf16
                                     ? delta_mix_cuda_obstacle(p, options_.device)
                                     : "the CUDA kernels compute in bfloat16, this run in float32";
    if (obstacle.empty())
      return delta_mix_cuda({p, in.q, in.k, in.v, in.gate, in.beta, a_log, in.dt_bias.value}, sequences_);
    notice_once("KDA in torch's operations, token by token and slow: " + obstacle);
  }
  const Tensor q = exact(in.q), k = exact(in.k), v = exact(in.v), gate = exact(in.gate),
               beta = exact(in.beta);
  const DeltaMix mix{p, q, k, v, gate, beta, a_log, in.dt_bias.value};
  return kernel && options_.device.is_cpu() ? delta_mix_cpu(mix, sequences_)
                                            : delta_mix_composite(mix, sequences_);
}

at::Tensor TorchOps::gated_rms_norm(const Tensor& x, const Weight& w, const Tensor* z) {
  const int64_t width = config_.linear.value_dim;
  if (x.is_cuda()) {
    const GateActivation activation = z == nullptr ? GateActivation::kNone
                                      : config_.linear.output_gate == OutputGate::kSilu
                                          ? GateActivation::kSilu
                                          : GateActivation::kSigmoid;
    if (auto y = gated_norm_cuda(x, w.value, config_.norm_eps, z, activation)) return *y;
  }
  Tensor y = normalized(x.view({x.size(0), -1, width}), w.value, config_.norm_eps).view(x.sizes());
  if (z == nullptr) return y;
  const Tensor gate = exact(*z);
  return y * (config_.linear.output_gate == OutputGate::kSilu ? at::silu(gate) : at::sigmoid(gate));
}

// [rows][...][rope], pairs (0, 1), (2, 3), ... turned by position * theta^(-i / rope)
at::Tensor TorchOps::rotated(const Tensor& x) const {
  const MlaConfig& a = config_.mla;
  if (!a.use_rope || a.rope == 0) return x;
  const Tensor i = at::arange(0, a.rope, 2, at::TensorOptions(at::kDouble).device(x.device()));
  const Tensor rate = at::pow(a.rope_theta, -i / static_cast<double>(a.rope));
  Tensor angle = sequences_.positions.to(at::kDouble).unsqueeze(-1) * rate;
  while (angle.dim() < x.dim()) angle = angle.unsqueeze(1);
  const Tensor cos = angle.cos().to(options_.dtype), sin = angle.sin().to(options_.dtype);
  const Tensor pairs = exact(x).unflatten(-1, {a.rope / 2, 2});
  const Tensor first = pairs.select(-1, 0), second = pairs.select(-1, 1);
  return at::stack({first * cos - second * sin, first * sin + second * cos}, -1).flatten(-2).to(x.dtype());
}

// q, k [rows][heads][width], v [rows][heads][value], causal inside each sequence
at::Tensor TorchOps::attention(const Tensor& q, const Tensor& k, const Tensor& v) const {
  const int64_t heads = q.size(1), width = std::max(q.size(2), v.size(2));
  // The fused kernels want all three of one width.
  const auto padded = [&](const Tensor& x) {
    return x.size(2) == width ? x : at::constant_pad_nd(x, {0, width - x.size(2)});
  };
  const Tensor wide_q = padded(q), wide_k = padded(k), wide_v = padded(v);
  const double scale = 1.0 / std::sqrt(static_cast<double>(q.size(2)));
  std::vector<Tensor> out;
  for (int64_t s = 0; s < sequences_.count();) {
    // sequences of one length that follow each other, at once
    const int64_t length = sequences_.length(s);
    const int64_t first = sequences_.cu[static_cast<size_t>(s)];
    int64_t count = 1;
    while (s + count < sequences_.count() && sequences_.length(s + count) == length) ++count;
    s += count;
    if (length == 0) continue;
    const auto part = [&](const Tensor& x) {
      return x.narrow(0, first, count * length).view({count, length, heads, width}).transpose(1, 2);
    };
    const Tensor y = at::scaled_dot_product_attention(part(wide_q), part(wide_k), part(wide_v), std::nullopt,
                                                      0.0, true, scale);
    out.push_back(y.transpose(1, 2).reshape({count * length, heads, width}));
  }
  return (out.size() == 1 ? out[0] : at::cat(out)).narrow(2, 0, v.size(2)).reshape({q.size(0), -1});
}

at::Tensor TorchOps::mla_mix(const Tensor& q, const Tensor& kv, const MlaWeights<Weight>& w, int) {
  const MlaConfig& a = config_.mla;
  const int64_t rows = q.size(0);
  const Tensor latent = normalized(kv.narrow(1, 0, a.latent), w.kv_norm.value, a.latent_norm_eps);
  const Tensor keys_values = linear(latent, w.kv_b).view({rows, a.heads, a.nope + a.value});
  Tensor queries = q.view({rows, a.heads, a.nope + a.rope});
  Tensor keys = keys_values.narrow(2, 0, a.nope);
  if (a.rope > 0) {
    const Tensor shared =
        rotated(kv.narrow(1, a.latent, a.rope)).unsqueeze(1).expand({rows, a.heads, a.rope});
    keys = at::cat({keys, shared}, 2);
    if (a.use_rope)
      queries = at::cat({queries.narrow(2, 0, a.nope), rotated(queries.narrow(2, a.nope, a.rope))}, 2);
  }
  return attention(queries, keys, keys_values.narrow(2, a.nope, a.value));
}

at::Tensor TorchOps::swiglu(const Tensor& gate, const Tensor& up) { return at::silu(gate) * up; }

void TorchOps::add_to(Tensor& x, const Tensor& y) { x = x + y; }

at::Tensor TorchOps::wanted_rows(const Tensor& x) {
  return wanted_.defined() ? x.index_select(0, wanted_) : x;
}

void TorchOps::run_layer(int layer, Tensor& x, const Block& block) {
  if (!options_.checkpoint_activations) return block(x);
  const auto again = [this, block](Tensor& y) {
    const bool count = std::exchange(count_, false);
    block(y);
    count_ = count;
  };
  x = recompute(block, again, (*leaves_)[static_cast<size_t>(layer)], x);
}

}  // namespace kilin::train
