// SPDX-License-Identifier: Apache-2.0
#include "kernels/moe/moe.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>

#include "base/error.h"
#include "kernels/norm/norm.h"

namespace kilin {
namespace {

void activate(const RouterParams& p, const float* logits, float* scores) {
  if (p.activation == RouterActivation::kSigmoid) {
    for (int e = 0; e < p.experts; ++e) scores[e] = 1.0f / (1.0f + std::exp(-logits[e]));
    return;
  }
  const float top = *std::max_element(logits, logits + p.experts);
  float sum = 0;
  for (int e = 0; e < p.experts; ++e) sum += scores[e] = std::exp(logits[e] - top);
  for (int e = 0; e < p.experts; ++e) scores[e] /= sum;
}

// Choices of the groups that are not kept become 0, as in the reference implementations.
void mask_groups(const RouterParams& p, std::vector<float>& choice) {
  if (p.groups <= 1 || p.groups_kept >= p.groups) return;
  const int size = p.experts / p.groups;
  std::vector<std::pair<float, int>> best(static_cast<size_t>(p.groups));
  for (int g = 0; g < p.groups; ++g) {
    std::vector<float> members(choice.begin() + g * size, choice.begin() + (g + 1) * size);
    const size_t two = std::min<size_t>(2, members.size());
    std::partial_sort(members.begin(), members.begin() + static_cast<long>(two), members.end(),
                      std::greater<>());
    best[static_cast<size_t>(g)] = {
        std::accumulate(members.begin(), members.begin() + static_cast<long>(two), 0.0f), g};
  }
  std::stable_sort(best.begin(), best.end(), [](const auto& a, const auto& b) { return a.first > b.first; });
  for (size_t i = static_cast<size_t>(p.groups_kept); i < best.size(); ++i) {
    const auto begin = choice.begin() + best[i].second * size;
    std::fill(begin, begin + size, 0.0f);
  }
}

}  // namespace

void route(const RouterParams& p, int64_t tokens, const float* logits, const float* bias, int32_t* ids,
           float* weights) {
  KILIN_ASSERT(p.top_k >= 1 && p.top_k <= p.experts);
  std::vector<float> scores(static_cast<size_t>(p.experts));
  std::vector<float> choice(scores.size());
  std::vector<int32_t> order(scores.size());
  for (int64_t t = 0; t < tokens; ++t) {
    activate(p, logits + t * p.experts, scores.data());
    for (size_t e = 0; e < choice.size(); ++e) choice[e] = scores[e] + (bias != nullptr ? bias[e] : 0.0f);
    if (p.biased_weights) scores = choice;
    mask_groups(p, choice);
    std::iota(order.begin(), order.end(), 0);
    std::partial_sort(order.begin(), order.begin() + p.top_k, order.end(), [&](int32_t a, int32_t b) {
      const float ca = choice[static_cast<size_t>(a)];
      const float cb = choice[static_cast<size_t>(b)];
      return ca != cb ? ca > cb : a < b;
    });
    float sum = 0;
    for (int j = 0; j < p.top_k; ++j) sum += scores[static_cast<size_t>(order[static_cast<size_t>(j)])];
    const float factor = p.scale / (p.renormalize ? sum + 1e-20f : 1.0f);
    for (int j = 0; j < p.top_k; ++j) {
      const int32_t expert = order[static_cast<size_t>(j)];
      ids[t * p.top_k + j] = expert;
      weights[t * p.top_k + j] = scores[static_cast<size_t>(expert)] * factor;
    }
  }
}

namespace {

// Rows of the grouped results: row_of[t * top_k + j] = the row of token t for its j-th expert, token_of its
// inverse; the rows of expert e are [offsets[e], offsets[e + 1]).
void group_by_expert(int64_t choices, int top_k, size_t experts, const int32_t* ids, MoeScratch& s) {
  s.offsets.assign(experts + 1, 0);
  for (int64_t i = 0; i < choices; ++i) ++s.offsets[static_cast<size_t>(ids[i]) + 1];
  std::partial_sum(s.offsets.begin(), s.offsets.end(), s.offsets.begin());
  std::vector<int32_t> next(s.offsets.begin(), s.offsets.end() - 1);
  s.row_of.resize(static_cast<size_t>(choices));
  s.token_of.resize(s.row_of.size());
  for (int64_t i = 0; i < choices; ++i) {
    const int32_t row = next[static_cast<size_t>(ids[i])]++;
    s.row_of[static_cast<size_t>(i)] = row;
    s.token_of[static_cast<size_t>(row)] = static_cast<int32_t>(i / top_k);
  }
}

void grow(HugeVector<float>& v, int64_t n) {
  if (v.size() < static_cast<size_t>(n)) v.resize(static_cast<size_t>(n));
}

}  // namespace

void moe_experts(int64_t tokens, int64_t hidden, int top_k, const float* x, const int32_t* ids,
                 const float* weights, std::span<const ExpertWeights> experts, const ExpertWeights* shared,
                 float* y, MoeScratch& s, ThreadPool& pool, Activations activations) {
  if (tokens == 0) return;
  const int64_t rows = tokens * top_k;
  const int64_t width = experts.front().gate.rows;
  const int64_t shared_width = shared != nullptr ? shared->gate.rows : 0;
  const int64_t inner = rows * width + tokens * shared_width;  // values of silu(gate) * up
  group_by_expert(rows, top_k, experts.size(), ids, s);
  grow(s.out, rows * hidden);
  grow(s.hidden, 2 * inner);
  float* gate = s.hidden.data();
  float* up = gate + inner;
  // Two parallel regions for all experts and the shared one: gate and up, then down.
  s.jobs.clear();
  for (size_t e = 0; e < experts.size(); ++e) {
    const int64_t first = s.offsets[e];
    const int64_t count = s.offsets[e + 1] - first;
    if (count == 0) continue;
    // one token: its chosen experts all read x itself, so that it is prepared once
    const int32_t* from = tokens > 1 ? s.token_of.data() + first : nullptr;
    s.jobs.push_back({count, x, hidden, experts[e].gate, gate + first * width, width, from, tokens});
    s.jobs.push_back({count, x, hidden, experts[e].up, up + first * width, width, from, tokens});
  }
  if (shared != nullptr) {
    s.jobs.push_back({tokens, x, hidden, shared->gate, gate + rows * width, shared_width});
    s.jobs.push_back({tokens, x, hidden, shared->up, up + rows * width, shared_width});
  }
  matmul(s.jobs, pool, activations);
  swiglu(inner, gate, up, gate, pool);
  s.jobs.clear();
  for (size_t e = 0; e < experts.size(); ++e) {
    const int64_t first = s.offsets[e];
    const int64_t count = s.offsets[e + 1] - first;
    if (count == 0) continue;
    s.jobs.push_back(
        {count, gate + first * width, width, experts[e].down, s.out.data() + first * hidden, hidden});
  }
  if (shared != nullptr)
    s.jobs.push_back({tokens, gate + rows * width, shared_width, shared->down, y, hidden});
  matmul(s.jobs, pool, activations);
  if (shared == nullptr) std::memset(y, 0, static_cast<size_t>(tokens * hidden) * sizeof(float));
  pool.parallel_for(tokens > 8 ? tokens : 1, [&](int64_t task, int) {
    const int64_t begin = tokens > 8 ? task : 0;
    const int64_t end = tokens > 8 ? task + 1 : tokens;
    for (int64_t i = begin * top_k; i < end * top_k; ++i) {
      add_scaled(hidden, weights[i], s.out.data() + s.row_of[static_cast<size_t>(i)] * hidden,
                 y + i / top_k * hidden);
    }
  });
}

}  // namespace kilin
