// SPDX-License-Identifier: Apache-2.0
#include "engine/engine_ops.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "base/error.h"
#include "kernels/conv/short_conv.h"
#include "kernels/kda/kda.h"
#include "kernels/mla/mla.h"
#include "kernels/norm/norm.h"
#include "quant/formats.h"

namespace kilin {

void EngineOps::begin(const Batch& batch) {
  batch_ = batch;
  arena_.release(start_);
  positions_.resize(batch.tokens.size());
  for (int s = 0; s < batch.sequences(); ++s) {
    const auto at = static_cast<size_t>(s);
    const int64_t count = batch.cu_seqlens[at + 1] - batch.cu_seqlens[at];
    for (int64_t i = 0; i < count; ++i) {
      positions_[static_cast<size_t>(batch.cu_seqlens[at] + i)] = batch.past[at] + i;
    }
    cache_.reserve(batch.slots[at], batch.past[at], batch.past[at] + count);
  }
}

EngineTensor EngineOps::tensor(int64_t rows, int64_t width) {
  return {arena_.allocate(rows * width), rows, width};
}

MatmulJob EngineOps::job(const Tensor& x, const Weight& w, Tensor& y) {
  KILIN_ASSERT(x.width == w.matrix.cols);
  y = tensor(x.rows, w.matrix.rows);
  return {x.rows, x.data, x.width, w.matrix, y.data, y.width};
}

EngineTensor EngineOps::embed(const Weight& table) {
  const TensorView& view = table.table;
  Tensor x = tensor(batch_.rows(), view.shape.at(1));
  for (int64_t r = 0; r < x.rows; ++r) {
    const int64_t first = batch_.tokens[static_cast<size_t>(r)] * x.width;
    const auto* row = static_cast<const std::byte*>(view.data) + dtype_bytes(view.dtype, first);
    quant::dequantize(view.dtype, row, x.width, x.data + r * x.width);
  }
  return x;
}

EngineTensor EngineOps::rms_norm(const Tensor& x, const Weight& w, double eps) {
  Tensor y = tensor(x.rows, x.width);
  kilin::rms_norm(x.rows, x.width, x.data, x.width, w.vector, static_cast<float>(eps), y.data, y.width,
                  pool_);
  return y;
}

EngineTensor EngineOps::linear(const Tensor& x, const Weight& w) { return linears<1>(x, {&w})[0]; }

EngineTensor EngineOps::short_conv(const Tensor& x, const Weight* w, int layer, ConvStream stream) {
  Tensor y = tensor(x.rows, x.width);
  if (w == nullptr) {
    silu(x.rows * x.width, x.data, y.data, pool_);
    return y;
  }
  ShortConvParams p;
  p.channels = x.width;
  p.taps = config_.linear.conv_taps;
  p.sequences = batch_.sequences();
  p.cu_seqlens = batch_.cu_seqlens.data();
  p.slots = batch_.slots.data();
  p.u = x.data;
  p.u_stride = x.width;
  p.w = w->vector;
  p.state = cache_.conv(layer, stream);
  p.slot_stride = cache_.conv_stride();
  p.y = y.data;
  p.y_stride = y.width;
  kilin::short_conv(p, pool_);
  return y;
}

EngineTensor EngineOps::delta_mix(const MixInputs<Tensor, Weight>& in, int layer, LayerKind kind) {
  const LinearAttentionConfig& c = config_.linear;
  Tensor out = tensor(in.v.rows, in.v.width);
  KdaParams p;
  p.heads = static_cast<int>(c.heads);
  p.value_heads = static_cast<int>(c.value_heads);
  p.key_dim = static_cast<int>(c.key_dim);
  p.value_dim = static_cast<int>(c.value_dim);
  p.sequences = batch_.sequences();
  p.cu_seqlens = batch_.cu_seqlens.data();
  p.slots = batch_.slots.data();
  p.q = in.q.data;
  p.k = in.k.data;
  p.v = in.v.data;
  p.gate = in.gate.data;
  p.beta = in.beta.data;
  p.q_stride = in.q.width;
  p.k_stride = in.k.width;
  p.v_stride = in.v.width;
  p.gate_stride = in.gate.width;
  p.beta_stride = in.beta.width;
  p.gate_kind = c.gate_lower_bound ? KdaGate::kBounded : KdaGate::kSoftplus;
  p.scalar_gate = kind == LayerKind::kGdn;
  p.lower_bound = static_cast<float>(c.gate_lower_bound.value_or(-5.0));
  p.a_log = in.a_log.vector;
  p.dt_bias = in.dt_bias.vector;
  p.l2norm = true;
  p.beta_is_logit = true;
  p.scale = 1.0f / std::sqrt(static_cast<float>(c.key_dim));
  p.state = cache_.state(layer);
  p.slot_stride = cache_.state_stride();
  p.out = out.data;
  p.out_stride = out.width;
  kda_forward(p, pool_);
  return out;
}

EngineTensor EngineOps::gated_rms_norm(const Tensor& x, const Weight& w, const Tensor* z) {
  const LinearAttentionConfig& c = config_.linear;
  Tensor y = tensor(x.rows, x.width);
  const GateActivation activation = z == nullptr                         ? GateActivation::kNone
                                    : c.output_gate == OutputGate::kSilu ? GateActivation::kSilu
                                                                         : GateActivation::kSigmoid;
  kilin::gated_rms_norm(x.rows, c.value_heads, c.value_dim, x.data, w.vector,
                        static_cast<float>(config_.norm_eps), z == nullptr ? nullptr : z->data, activation,
                        y.data, pool_);
  return y;
}

// Cache rows of the batch's tokens: the latent after its norm, and the shared key part as it is or rotated.
void EngineOps::append_latents(const Tensor& kv, const MlaWeights<Weight>& w, int layer) {
  const MlaConfig& c = config_.mla;
  const auto scope = this->scope();
  const Tensor rows = tensor(kv.rows, c.latent + c.rope);
  kilin::rms_norm(kv.rows, c.latent, kv.data, kv.width, w.kv_norm.vector,
                  static_cast<float>(c.latent_norm_eps), rows.data, rows.width, pool_);
  const auto store = [&](int64_t r, int32_t slot) {
    const int64_t position = positions_[static_cast<size_t>(r)];
    float* row = rows.data + r * rows.width;
    std::memcpy(row + c.latent, kv.data + r * kv.width + c.latent,
                static_cast<size_t>(c.rope) * sizeof(float));
    if (c.use_rope) rope_interleaved(1, c.rope, c.rope_theta, &position, row + c.latent, c.rope);
    cache_.store_latent(layer, slot, position, row);
  };
  for (int s = 0; s < batch_.sequences(); ++s) {
    const auto at = static_cast<size_t>(s);
    const int64_t begin = batch_.cu_seqlens[at];
    const int64_t count = batch_.cu_seqlens[at + 1] - begin;
    constexpr int64_t kRows = 64;  // of one task
    pool_.parallel_for((count + kRows - 1) / kRows, [&](int64_t i, int) {
      for (int64_t r = i * kRows; r < std::min(count, (i + 1) * kRows); ++r)
        store(begin + r, batch_.slots[at]);
    });
  }
}

EngineTensor EngineOps::mla_mix(const Tensor& q, const Tensor& kv, const MlaWeights<Weight>& w, int layer) {
  const MlaConfig& c = config_.mla;
  append_latents(kv, w, layer);
  if (c.use_rope) {
    for (int64_t h = 0; h < c.heads; ++h) {
      rope_interleaved(q.rows, c.rope, c.rope_theta, positions(), q.data + h * (c.nope + c.rope) + c.nope,
                       q.width);
    }
  }
  std::vector<MlaSequence> sequences(batch_.slots.size());
  for (size_t s = 0; s < sequences.size(); ++s) {
    sequences[s] = {batch_.cu_seqlens[s], batch_.cu_seqlens[s + 1] - batch_.cu_seqlens[s], batch_.past[s],
                    cache_.pages(layer, batch_.slots[s])};
  }
  Tensor out = tensor(q.rows, c.heads * c.value);
  MlaParams p;
  p.heads = c.heads;
  p.nope = c.nope;
  p.rope = c.rope;
  p.value = c.value;
  p.latent = c.latent;
  p.scale = 1.0f / std::sqrt(static_cast<float>(c.nope + c.rope));
  p.page_tokens = Cache::kPageTokens;
  p.page_stride = cache_.latent_width();
  p.sequences = static_cast<int64_t>(sequences.size());
  p.sequence = sequences.data();
  p.q = q.data;
  const LatentHeads& heads = model_.latent_heads(layer);
  p.k_absorb = heads.k_absorb.data();
  p.k_expand = heads.k_expand.data();
  p.value_up = heads.value_up.data();
  p.cache_type = cache_.latent_type();
  p.activations = activations_;
  p.out = out.data;
  mla_attention(p, pool_);
  return out;
}

EngineTensor EngineOps::swiglu(const Tensor& gate, const Tensor& up) {
  kilin::swiglu(gate.rows * gate.width, gate.data, up.data, gate.data, pool_);
  return gate;
}

// Never with rounded activations: a rounding that turns a close choice costs more than these few products.
EngineTensor EngineOps::router_logits(const Tensor& x, const Weight& w) {
  Tensor y;
  const MatmulJob product = job(x, w, y);
  matmul(std::span(&product, 1), pool_);
  return y;
}

EngineTensor EngineOps::moe(const Tensor& x, const MoeWeights<Weight>& w, int layer) {
  const MoeConfig& c = config_.moe;
  const Tensor logits = router_logits(x, w.router);
  RouterParams router;
  router.experts = static_cast<int>(c.experts);
  router.top_k = static_cast<int>(c.top_k);
  router.groups = static_cast<int>(c.groups);
  router.groups_kept = static_cast<int>(c.groups_kept);
  router.renormalize = c.renormalize;
  router.biased_weights = c.biased_weights;
  router.scale = static_cast<float>(c.scale);
  router.activation = c.sigmoid_router ? RouterActivation::kSigmoid : RouterActivation::kSoftmax;
  expert_ids_.resize(static_cast<size_t>(x.rows * c.top_k));
  expert_weights_.resize(expert_ids_.size());
  constexpr int64_t kRows = 64;  // of one task
  pool_.parallel_for((x.rows + kRows - 1) / kRows, [&](int64_t i, int) {
    const int64_t first = i * kRows;
    route(router, std::min(kRows, x.rows - first), logits.data + first * logits.width, w.router_bias.vector,
          expert_ids_.data() + first * c.top_k, expert_weights_.data() + first * c.top_k);
  });
  Tensor y = tensor(x.rows, x.width);
  const auto& shared = model_.shared(layer);
  moe_experts(x.rows, x.width, router.top_k, x.data, expert_ids_.data(), expert_weights_.data(),
              model_.experts(layer), shared ? &*shared : nullptr, y.data, moe_scratch_, pool_, activations_);
  return y;
}

void EngineOps::add_to(Tensor& x, const Tensor& y) { add_in_place(x.rows * x.width, x.data, y.data, pool_); }

EngineTensor EngineOps::wanted_rows(const Tensor& x) {
  Tensor y = tensor(static_cast<int64_t>(batch_.wanted.size()), x.width);
  for (int64_t r = 0; r < y.rows; ++r) {
    std::memcpy(y.data + r * y.width, x.data + batch_.wanted[static_cast<size_t>(r)] * x.width,
                static_cast<size_t>(x.width) * sizeof(float));
  }
  return y;
}

}  // namespace kilin
