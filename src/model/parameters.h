// SPDX-License-Identifier: Apache-2.0
// Every parameter's name, shape and role, written once. The loader, `kilin info`, the quantiser and the
// trainer visit this table; W is what a parameter is for them (a mapped matrix, a torch tensor, a plain
// matrix).
//
// Names and shapes are those of Moonshot's checkpoints; other spellings of the same tensor are in
// alternatives.h.
#pragma once
#include <string>
#include <vector>

#include "model/config.h"
#include "tensor/tensor_view.h"

namespace kilin {

enum class Role {
  kEmbedding,   // [vocab][hidden], rows looked up
  kHead,        // [vocab][hidden]
  kProjection,  // [out][in], used whole for every token
  kExpert,      // [out][in], used for the tokens routed to it
  kRouter,      // [experts][hidden], float32 arithmetic
  kConv,        // [channels][1][taps]
  kVector,      // norm weights, gate parameters, router bias
};

struct Parameter {
  std::string name;
  Shape shape;
  Role role;
};

template <class W>
struct LinearAttentionWeights {
  W q, k, v;                 // [heads * key_dim][hidden] x 2, [value_heads * value_dim][hidden]
  W q_conv, k_conv, v_conv;  // [channels][1][taps], absent without convolution
  W f_a, f_b;                // KDA: low-rank forget gate; GDN: f_a is the whole gate, [value_heads][hidden]
  W a_log, dt_bias;          // [value_heads]; [value_heads * key_dim], GDN [value_heads]
  W beta;                    // [value_heads][hidden]
  W g_a, g_b;                // low-rank output gate, absent without output gate
  W o_norm;                  // [value_dim]
  W o;                       // [hidden][value_heads * value_dim]
};

template <class W>
struct MlaWeights {
  W q;        // [heads * (nope + rope)][hidden]
  W kv_a;     // [latent + rope][hidden]
  W kv_norm;  // [latent]
  W kv_b;     // [heads * (nope + value)][latent]
  W o;        // [hidden][heads * value]
};

template <class W>
struct MlpWeights {
  W gate, up;  // [width][hidden]
  W down;      // [hidden][width]
};

template <class W>
struct MoeWeights {
  W router;       // [experts][hidden]
  W router_bias;  // [experts]
  std::vector<MlpWeights<W>> experts;
  MlpWeights<W> shared;  // absent without shared experts
};

template <class W>
struct LayerWeights {
  W input_norm;  // [hidden]
  LinearAttentionWeights<W> linear;
  MlaWeights<W> mla;
  W post_norm;  // [hidden]
  MlpWeights<W> mlp;
  MoeWeights<W> moe;
};

template <class W>
struct ModelWeights {
  W embedding;
  std::vector<LayerWeights<W>> layers;
  W norm;
  W head;  // unused when the head is tied to the embedding

  explicit ModelWeights(const Config& c) : layers(c.layers.size()) {
    for (size_t i = 0; i < layers.size(); ++i) {
      if (c.sparse[i]) layers[i].moe.experts.resize(static_cast<size_t>(c.moe.experts));
    }
  }
};

namespace detail {

template <class W, class F>
void visit_linear_attention(LinearAttentionWeights<W>& w, const Config& c, LayerKind kind,
                            const std::string& p, F& f) {
  const LinearAttentionConfig& a = c.linear;
  const int64_t qk = a.heads * a.key_dim;
  const int64_t v = a.value_heads * a.value_dim;
  f(Parameter{p + "q_proj.weight", {qk, c.hidden}, Role::kProjection}, w.q);
  f(Parameter{p + "k_proj.weight", {qk, c.hidden}, Role::kProjection}, w.k);
  f(Parameter{p + "v_proj.weight", {v, c.hidden}, Role::kProjection}, w.v);
  if (a.conv_taps > 1) {
    f(Parameter{p + "q_conv1d.weight", {qk, 1, a.conv_taps}, Role::kConv}, w.q_conv);
    f(Parameter{p + "k_conv1d.weight", {qk, 1, a.conv_taps}, Role::kConv}, w.k_conv);
    f(Parameter{p + "v_conv1d.weight", {v, 1, a.conv_taps}, Role::kConv}, w.v_conv);
  }
  if (kind == LayerKind::kKda) {
    f(Parameter{p + "f_a_proj.weight", {a.key_dim, c.hidden}, Role::kProjection}, w.f_a);
    f(Parameter{p + "f_b_proj.weight", {a.value_heads * a.key_dim, a.key_dim}, Role::kProjection}, w.f_b);
    f(Parameter{p + "dt_bias", {a.value_heads * a.key_dim}, Role::kVector}, w.dt_bias);
  } else {
    f(Parameter{p + "a_proj.weight", {a.value_heads, c.hidden}, Role::kProjection}, w.f_a);
    f(Parameter{p + "dt_bias", {a.value_heads}, Role::kVector}, w.dt_bias);
  }
  f(Parameter{p + "A_log", {1, 1, a.value_heads, 1}, Role::kVector}, w.a_log);
  f(Parameter{p + "b_proj.weight", {a.value_heads, c.hidden}, Role::kProjection}, w.beta);
  if (a.output_gate != OutputGate::kNone) {
    f(Parameter{p + "g_a_proj.weight", {a.value_dim, c.hidden}, Role::kProjection}, w.g_a);
    f(Parameter{p + "g_b_proj.weight", {v, a.value_dim}, Role::kProjection}, w.g_b);
  }
  f(Parameter{p + "o_norm.weight", {a.value_dim}, Role::kVector}, w.o_norm);
  f(Parameter{p + "o_proj.weight", {c.hidden, v}, Role::kProjection}, w.o);
}

template <class W, class F>
void visit_mla(MlaWeights<W>& w, const Config& c, const std::string& p, F& f) {
  const MlaConfig& a = c.mla;
  f(Parameter{p + "q_proj.weight", {a.heads * (a.nope + a.rope), c.hidden}, Role::kProjection}, w.q);
  f(Parameter{p + "kv_a_proj_with_mqa.weight", {a.latent + a.rope, c.hidden}, Role::kProjection}, w.kv_a);
  f(Parameter{p + "kv_a_layernorm.weight", {a.latent}, Role::kVector}, w.kv_norm);
  f(Parameter{p + "kv_b_proj.weight", {a.heads * (a.nope + a.value), a.latent}, Role::kProjection}, w.kv_b);
  f(Parameter{p + "o_proj.weight", {c.hidden, a.heads * a.value}, Role::kProjection}, w.o);
}

template <class W, class F>
void visit_mlp(MlpWeights<W>& w, int64_t hidden, int64_t width, const std::string& p, F& f) {
  f(Parameter{p + "gate_proj.weight", {width, hidden}, Role::kProjection}, w.gate);
  f(Parameter{p + "up_proj.weight", {width, hidden}, Role::kProjection}, w.up);
  f(Parameter{p + "down_proj.weight", {hidden, width}, Role::kProjection}, w.down);
}

template <class W, class F>
void visit_moe(MoeWeights<W>& w, const Config& c, const std::string& p, F& f) {
  const MoeConfig& m = c.moe;
  f(Parameter{p + "gate.weight", {m.experts, c.hidden}, Role::kRouter}, w.router);
  f(Parameter{p + "gate.e_score_correction_bias", {m.experts}, Role::kVector}, w.router_bias);
  for (int64_t e = 0; e < m.experts; ++e) {
    const std::string expert = p + "experts." + std::to_string(e) + ".";
    MlpWeights<W>& x = w.experts[static_cast<size_t>(e)];
    f(Parameter{expert + "w1.weight", {m.width, c.hidden}, Role::kExpert}, x.gate);
    f(Parameter{expert + "w3.weight", {m.width, c.hidden}, Role::kExpert}, x.up);
    f(Parameter{expert + "w2.weight", {c.hidden, m.width}, Role::kExpert}, x.down);
  }
  if (m.shared > 0) visit_mlp(w.shared, c.hidden, m.shared * m.width, p + "shared_experts.", f);
}

}  // namespace detail

// f(const Parameter&, W&) for every parameter of the model, in the order of computation.
template <class W, class F>
void visit_parameters(ModelWeights<W>& w, const Config& c,
                      F&& f) {  // NOLINT(cppcoreguidelines-missing-std-forward)
  f(Parameter{"model.embed_tokens.weight", {c.vocab_size, c.hidden}, Role::kEmbedding}, w.embedding);
  for (size_t i = 0; i < w.layers.size(); ++i) {
    LayerWeights<W>& layer = w.layers[i];
    const std::string p = "model.layers." + std::to_string(i) + ".";
    f(Parameter{p + "input_layernorm.weight", {c.hidden}, Role::kVector}, layer.input_norm);
    if (c.layers[i] == LayerKind::kMla) {
      detail::visit_mla(layer.mla, c, p + "self_attn.", f);
    } else {
      detail::visit_linear_attention(layer.linear, c, c.layers[i], p + "self_attn.", f);
    }
    f(Parameter{p + "post_attention_layernorm.weight", {c.hidden}, Role::kVector}, layer.post_norm);
    if (c.sparse[i]) {
      detail::visit_moe(layer.moe, c, p + "block_sparse_moe.", f);
    } else {
      detail::visit_mlp(layer.mlp, c.hidden, c.dense_width, p + "mlp.", f);
    }
  }
  f(Parameter{"model.norm.weight", {c.hidden}, Role::kVector}, w.norm);
  if (!c.tied_head) f(Parameter{"lm_head.weight", {c.vocab_size, c.hidden}, Role::kHead}, w.head);
}

}  // namespace kilin
