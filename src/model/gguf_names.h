// SPDX-License-Identifier: Apache-2.0
// Names of the tensors of GGUF files of architecture `kimi-linear`, as llama.cpp's converter writes them.
#pragma once
#include <optional>
#include <string>

#include "model/parameters.h"

namespace kilin {

// "blk.3.attn_q.weight" for model.layers.3.self_attn.q_proj.weight; of an expert's matrix the name of the
// tensor that stacks all experts of the layer. kv_b_proj has the legacy name attn_kv_b.weight here: newer
// files hold two tensors, attn_k_b.weight and attn_v_b.weight. Names of what llama.cpp does not know (GDN's
// gate) are Kilin's own. "" for a name that is no parameter.
std::string gguf_name(const Parameter& parameter);

// The number E of model.layers.N.block_sparse_moe.experts.E.w1.weight; none for other parameters.
std::optional<int64_t> expert_number(const Parameter& parameter);

}  // namespace kilin
