// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <string>
#include <vector>

#include "model/parameters.h"

namespace kilin {

// What turns a stored tensor into the parameter.
enum class Transform {
  kNone,
  kLogOfNegative,  // A_log from GGUF's ssm_a: ln(-x)
  kJoinHeads,      // kv_b from GGUF's attn_k_b and attn_v_b: per head the transposed k_b, then v_b
};

// A place where a parameter may be stored: `elements` from `offset` on of the tensor `name` of shape `shape`.
struct TensorSource {
  std::string name;
  Shape shape;
  int64_t offset = 0;  // in elements
  Transform transform = Transform::kNone;
  std::string
      second_name;  // kJoinHeads: attn_v_b [heads][value][latent]; `name` is attn_k_b [heads][latent][nope]
  Shape second_shape;
};

// All places to look for a parameter, Moonshot's own spelling first, then those of transformers' native
// class: `forget_gate.` in front of the forget gate's parameters, one conv1d for q, k and v, `mlp.` for
// sparse layers (and `block_sparse_moe.` for dense ones, which save_pretrained writes), experts named
// gate/up/down or stacked in one tensor; then those of GGUF files (gguf_names.h).
std::vector<TensorSource> tensor_sources(const Parameter& parameter, const Config& config);

// Whether a stored shape is that of a parameter: equal but for dimensions of 1; vectors may come in any shape
// with as many elements (A_log is [1, 1, H, 1] in one checkpoint, [H, 1] in another).
bool same_shape(const Shape& stored, const Shape& expected, Role role);

}  // namespace kilin
