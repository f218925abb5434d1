// SPDX-License-Identifier: Apache-2.0
// Which tensors a GGUF file of a model has, of what they are made, and of which type each is.
#pragma once
#include <cstddef>
#include <string>
#include <vector>

#include "engine/convert.h"
#include "model/parameters.h"

namespace kilin {

// What of its parameters a tensor holds.
enum class Content {
  kWhole,        // the elements as they are, of several parameters one after the other (experts)
  kNegativeExp,  // ssm_a: -exp(A_log)
  kKeyRows,      // attn_k_b [heads][latent][nope]: of kv_b_proj, transposed per head
  kValueRows,    // attn_v_b [heads][value][latent]
};

struct PlannedTensor {
  std::string name;
  Shape shape;  // row-major
  Role role;
  Content content = Content::kWhole;
  std::vector<size_t> parameters;  // indices into the table of parameters
  Dtype dtype = Dtype::kF32;
  bool fell_back = false;  // from the wanted type, whose blocks the rows do not fill
};

// The tensors in the order of the table, as llama.cpp's converter shapes them; `dtype` not yet chosen.
std::vector<PlannedTensor> plan_gguf(const std::vector<Parameter>& parameters, const Config& config);

// The type in which `type` stores a tensor that is stored as `source` (docs/decisions/gguf.md); fell_back is
// set when rows are no multiple of the wanted type's block.
void choose_dtype(WeightType type, Dtype source, PlannedTensor& tensor);

}  // namespace kilin
