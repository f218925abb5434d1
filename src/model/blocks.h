// SPDX-License-Identifier: Apache-2.0
// The model, written once. Kimi Linear technical report (arXiv:2510.26692), section 4; exact arithmetic of
// each verb in ops.h. Every intermediate has a name: argument evaluation order is unspecified, and here it
// would be launch order.
#pragma once
#include "model/ops.h"

namespace kilin {

template <Ops O>
using WeightOf = typename O::Weight;
template <Ops O>
using TensorOf = typename O::Tensor;

// KDA and GDN layers: projections, short convolutions, delta rule, gated norm, output projection.
template <Ops O>
TensorOf<O> linear_attention_block(O& o, const Config& c, int layer, LayerKind kind,
                                   const LinearAttentionWeights<WeightOf<O>>& w, const TensorOf<O>& x) {
  const bool gated = c.linear.output_gate != OutputGate::kNone;
  auto [q_in, k_in, v_in, f_in, beta] = o.linears(x, std::array{&w.q, &w.k, &w.v, &w.f_a, &w.beta});
  const bool conv = c.linear.conv_taps > 1;
  auto q = o.short_conv(q_in, conv ? &w.q_conv : nullptr, layer, ConvStream::kQuery);
  auto k = o.short_conv(k_in, conv ? &w.k_conv : nullptr, layer, ConvStream::kKey);
  auto v = o.short_conv(v_in, conv ? &w.v_conv : nullptr, layer, ConvStream::kValue);
  auto f = kind == LayerKind::kKda ? o.linear(f_in, w.f_b) : f_in;
  auto mixed = o.delta_mix({q, k, v, f, beta, w.a_log, w.dt_bias}, layer, kind);
  if (!gated) {
    auto y = o.gated_rms_norm(mixed, w.o_norm, nullptr);
    return o.linear(y, w.o);
  }
  auto z_in = o.linear(x, w.g_a);
  auto z = o.linear(z_in, w.g_b);
  auto y = o.gated_rms_norm(mixed, w.o_norm, &z);
  return o.linear(y, w.o);
}

// Multi-head latent attention, without positions unless the configuration says so.
template <Ops O>
TensorOf<O> mla_block(O& o, int layer, const MlaWeights<WeightOf<O>>& w, const TensorOf<O>& x) {
  auto [q, kv] = o.linears(x, std::array{&w.q, &w.kv_a});
  auto y = o.mla_mix(q, kv, w, layer);
  return o.linear(y, w.o);
}

template <Ops O>
TensorOf<O> mlp_block(O& o, const MlpWeights<WeightOf<O>>& w, const TensorOf<O>& x) {
  auto [gate, up] = o.linears(x, std::array{&w.gate, &w.up});
  auto hidden = o.swiglu(gate, up);
  return o.linear(hidden, w.down);
}

// x + Attention(norm(x)), then x + MLP(norm(x))
template <Ops O>
void layer_block(O& o, const Config& c, int layer, const LayerWeights<WeightOf<O>>& w, TensorOf<O>& x) {
  const auto at = static_cast<size_t>(layer);
  {
    [[maybe_unused]] auto scope = o.scope();
    auto h = o.rms_norm(x, w.input_norm, c.norm_eps);
    auto y = c.layers[at] == LayerKind::kMla ? mla_block(o, layer, w.mla, h)
                                             : linear_attention_block(o, c, layer, c.layers[at], w.linear, h);
    o.add_to(x, y);
  }
  [[maybe_unused]] auto scope = o.scope();
  auto h = o.rms_norm(x, w.post_norm, c.norm_eps);
  auto y = c.sparse[at] ? o.moe(h, w.moe, layer) : mlp_block(o, w.mlp, h);
  o.add_to(x, y);
}

// An adapter that wants to run a layer itself, perhaps again later: o.run_layer(number, x, block) with
// block(x).
template <class O>
concept RunsLayers = requires(O& o, typename O::Tensor& x, typename O::Block& block) {
  o.run_layer(0, x, block);
};

// Logits [wanted rows][vocab] of the adapter's current batch.
template <Ops O>
TensorOf<O> model_forward(O& o, const Config& c, const ModelWeights<WeightOf<O>>& w) {
  auto x = o.embed(w.embedding);
  o.observe("embedding", 0, x);
  for (int layer = 0; layer < static_cast<int>(c.layer_count()); ++layer) {
    const auto& weights = w.layers[static_cast<size_t>(layer)];
    if constexpr (RunsLayers<O>) {
      o.run_layer(layer, x,
                  [&o, &c, layer, &weights](TensorOf<O>& y) { layer_block(o, c, layer, weights, y); });
    } else {
      layer_block(o, c, layer, weights, x);
    }
    o.observe("layer", layer, x);
  }
  auto wanted = o.wanted_rows(x);
  auto y = o.rms_norm(wanted, w.norm, c.norm_eps);
  o.observe("final_norm", 0, y);
  return o.linear(y, c.tied_head ? w.embedding : w.head);
}

}  // namespace kilin
