// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <string>
#include <vector>

#include "model/parameters.h"

namespace kilin {

// A place where a parameter may be stored: `elements` from `offset` on of the tensor `name` of shape `shape`.
struct TensorSource {
  std::string name;
  Shape shape;
  int64_t offset = 0;  // in elements
};

// All places to look for a parameter, Moonshot's own spelling first, then those of transformers' native
// class: `forget_gate.` in front of the forget gate's parameters, one conv1d for q, k and v, `mlp.` for
// sparse layers (and `block_sparse_moe.` for dense ones, which save_pretrained writes), experts named
// gate/up/down or stacked in one tensor.
std::vector<TensorSource> tensor_sources(const Parameter& parameter, const Config& config);

// Whether a stored shape is that of a parameter: equal but for dimensions of 1; vectors may come in any shape
// with as many elements (A_log is [1, 1, H, 1] in one checkpoint, [H, 1] in another).
bool same_shape(const Shape& stored, const Shape& expected, Role role);

}  // namespace kilin
