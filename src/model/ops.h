// SPDX-License-Identifier: Apache-2.0
// The vocabulary that the model text (blocks.h) speaks. An adapter gives it a meaning: EngineOps (arena,
// stored weights, our kernels), the oracle of the tests (plain loops over double or complex), later libtorch.
// A Tensor is [rows][width] over the rows of the adapter's current Batch; a Weight is what the parameter
// table holds. Recurrent state, caches and the Batch belong to the adapter and are found by layer number.
#pragma once
#include <array>
#include <concepts>
#include <string_view>

#include "model/parameters.h"

namespace kilin {

// Which of a linear-attention layer's three convolutions.
enum class ConvStream { kQuery, kKey, kValue };

// Inputs of the token mixing of a KDA or GDN layer, by head side by side: q, k [rows][heads * key_dim],
// v [rows][value_heads * value_dim], gate before its activation [rows][value_heads * key_dim] (GDN:
// [rows][value_heads]), beta before its sigmoid [rows][value_heads].
template <class Tensor, class Weight>
struct MixInputs {
  const Tensor& q;
  const Tensor& k;
  const Tensor& v;
  const Tensor& gate;
  const Tensor& beta;
  const Weight& a_log;
  const Weight& dt_bias;
};

template <class O>
concept Ops = requires(O& o, typename O::Tensor& x, const typename O::Tensor& t, const typename O::Weight& w,
                       const MixInputs<typename O::Tensor, typename O::Weight>& mix,
                       const MoeWeights<typename O::Weight>& moe, const MlaWeights<typename O::Weight>& mla) {
  // rows of the table for the batch's tokens
  { o.embed(w) } -> std::same_as<typename O::Tensor>;
  // w * x / sqrt(mean x^2 + eps)
  { o.rms_norm(t, w, 1e-5) } -> std::same_as<typename O::Tensor>;
  // x W^T
  { o.linear(t, w) } -> std::same_as<typename O::Tensor>;
  // several products of one input at once
  {
    o.linears(t, std::array<const typename O::Weight*, 2>{})
    } -> std::same_as<std::array<typename O::Tensor, 2>>;
  // causal depthwise convolution with the sequence's past inputs, then SiLU; a null weight: SiLU alone
  { o.short_conv(t, &w, 0, ConvStream::kQuery) } -> std::same_as<typename O::Tensor>;
  // l2norm of q and k, gate and beta activations, delta rule over time; moves the layer's state on
  { o.delta_mix(mix, 0, LayerKind::kKda) } -> std::same_as<typename O::Tensor>;
  // norm of each head's output, times the activated gate (null: no gate)
  { o.gated_rms_norm(t, w, &t) } -> std::same_as<typename O::Tensor>;
  // latent attention from q and [latent | shared key part] before its norm; appends to the layer's cache
  { o.mla_mix(t, t, mla, 0) } -> std::same_as<typename O::Tensor>;
  // silu(gate) * up
  { o.swiglu(t, t) } -> std::same_as<typename O::Tensor>;
  // routed and shared experts
  { o.moe(t, moe, 0) } -> std::same_as<typename O::Tensor>;
  // x += y
  {o.add_to(x, t)};
  // the batch's wanted rows
  { o.wanted_rows(t) } -> std::same_as<typename O::Tensor>;
  // everything made until the returned object dies may be given up then
  {o.scope()};
  // a hook for tests and measurements: what (embedding, layer, final_norm), layer number
  {o.observe(std::string_view(), 0, t)};
};

}  // namespace kilin
