// SPDX-License-Identifier: Apache-2.0
// Mixture of experts: choice of the experts and the grouped products (Kimi Linear, DeepSeek-V3 routing).
#pragma once
#include <cstdint>
#include <span>
#include <vector>

#include "base/huge_memory.h"
#include "base/thread_pool.h"
#include "kernels/matmul/matmul.h"

namespace kilin {

enum class RouterActivation { kSigmoid, kSoftmax };

struct RouterParams {
  int experts = 0;
  int top_k = 0;
  int groups = 1;       // experts are parted into this many equal groups ...
  int groups_kept = 1;  // ... of which the best (by the sum of its two best choices) are kept
  bool renormalize = true;
  bool biased_weights = false;  // weights from score + bias, as Moonshot's remote code does by accident
  float scale = 1.0f;
  RouterActivation activation = RouterActivation::kSigmoid;
};

// For each token: s = activation(logits); choice = s + bias; the top_k best choices (ties: the lower index),
// in descending order of choice; weight = s (or choice) of the chosen, divided by (their sum + 1e-20) if
// renormalize, times scale. logits [tokens][experts], bias [experts] or null, ids and weights
// [tokens][top_k].
void route(const RouterParams& params, int64_t tokens, const float* logits, const float* bias, int32_t* ids,
           float* weights);

struct ExpertWeights {
  WeightMatrix gate;  // [width][hidden]
  WeightMatrix up;    // [width][hidden]
  WeightMatrix down;  // [hidden][width]
};

// y[t] = sum_j weights[t][j] expert_{ids[t][j]}(x[t]) + (shared ? shared(x[t]) : 0), with expert(x) =
// down(silu(gate x) * up x). Tokens are grouped by expert, so that each chosen expert's weights are read
// once. x, y [tokens][hidden]; shared may be null. `scratch` keeps its memory between calls.
struct MoeScratch {
  HugeVector<float> hidden, out;
  std::vector<int32_t> row_of, token_of, offsets;
  std::vector<MatmulJob> jobs;
};
void moe_experts(int64_t tokens, int64_t hidden, int top_k, const float* x, const int32_t* ids,
                 const float* weights, std::span<const ExpertWeights> experts, const ExpertWeights* shared,
                 float* y, MoeScratch& scratch, ThreadPool& pool,
                 Activations activations = Activations::kExact);

}  // namespace kilin
