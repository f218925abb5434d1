// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <cstdint>
#include <span>
#include <unordered_set>
#include <vector>

#include "base/random.h"
#include "kilin/kilin.h"

namespace kilin {

// What kilin::Sampler does: repetition penalty, then temperature, top-k, top-p, min-p, then one draw. The
// order is that of transformers' generate(): penalty on logits, the filters on the distribution after the
// temperature.
class TokenSampler {
 public:
  explicit TokenSampler(const SamplingOptions& options);  // throws Error for values out of range
  void accept(int32_t token);
  int32_t sample(std::span<const float> logits);

 private:
  struct Candidate {
    float logit;
    int32_t id;
  };
  void collect(std::span<const float> logits);
  void keep_nucleus();
  int32_t draw();

  SamplingOptions options_;
  Random random_;
  std::unordered_set<int32_t> seen_;
  std::vector<float> penalised_;
  std::vector<Candidate> candidates_;
  std::vector<double> probabilities_;
};

}  // namespace kilin
