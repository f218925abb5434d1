// SPDX-License-Identifier: Apache-2.0
#include "engine/sampler.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "base/error.h"
#include "kernels/norm/norm.h"

namespace kilin {

TokenSampler::TokenSampler(const SamplingOptions& options) : options_(options), random_(options.seed) {
  check(options.temperature >= 0 && options.temperature <= 1e3, "temperature: found {}, expected 0 to 1000",
        options.temperature);
  check(options.top_k >= 0, "top-k: found {}, expected 0 (all) or more", options.top_k);
  check(options.top_p > 0 && options.top_p <= 1, "top-p: found {}, expected above 0 up to 1", options.top_p);
  check(options.min_p >= 0 && options.min_p <= 1, "min-p: found {}, expected 0 to 1", options.min_p);
  check(options.repetition_penalty > 0 && options.repetition_penalty <= 1e3,
        "repetition penalty: found {}, expected above 0 up to 1000", options.repetition_penalty);
}

void TokenSampler::accept(int32_t token) {
  if (options_.repetition_penalty != 1.0) seen_.insert(token);
}

int32_t TokenSampler::sample(std::span<const float> logits) {
  check(!logits.empty(), "sample: no logits (a sequence without tokens has none)");
  check(all_finite(static_cast<int64_t>(logits.size()), logits.data()),
        "sample: logits hold NaN or infinity");
  if (!seen_.empty()) {
    penalised_.assign(logits.begin(), logits.end());
    const auto penalty = static_cast<float>(options_.repetition_penalty);
    for (int32_t id : seen_) {
      if (id < 0 || static_cast<size_t>(id) >= penalised_.size()) continue;
      float& logit = penalised_[static_cast<size_t>(id)];
      logit = logit > 0 ? logit / penalty : logit * penalty;
    }
    logits = penalised_;
  }
  if (options_.temperature == 0) {
    return static_cast<int32_t>(std::max_element(logits.begin(), logits.end()) - logits.begin());
  }
  collect(logits);
  keep_nucleus();
  return draw();
}

// The candidates that top-k leaves, most likely first (ties: the lower id).
void TokenSampler::collect(std::span<const float> logits) {
  candidates_.resize(logits.size());
  for (size_t i = 0; i < logits.size(); ++i) candidates_[i] = {logits[i], static_cast<int32_t>(i)};
  const auto likelier = [](const Candidate& a, const Candidate& b) {
    return a.logit != b.logit ? a.logit > b.logit : a.id < b.id;
  };
  const bool all = options_.top_k == 0 || static_cast<size_t>(options_.top_k) >= candidates_.size();
  if (!all) {
    std::nth_element(candidates_.begin(), candidates_.begin() + options_.top_k, candidates_.end(), likelier);
    candidates_.resize(static_cast<size_t>(options_.top_k));
  }
  std::sort(candidates_.begin(), candidates_.end(), likelier);
}

// Probabilities (not normalised: the most likely has 1) of what top-p and min-p leave.
void TokenSampler::keep_nucleus() {
  const double top = candidates_.front().logit;
  probabilities_.clear();
  for (const Candidate& c : candidates_) {
    probabilities_.push_back(std::exp((static_cast<double>(c.logit) - top) / options_.temperature));
  }
  const double total = std::accumulate(probabilities_.begin(), probabilities_.end(), 0.0);
  size_t kept = probabilities_.size();
  if (options_.top_p < 1) {  // the fewest whose sum reaches top_p
    double sum = 0;
    for (kept = 0; kept < probabilities_.size() && sum < options_.top_p * total; ++kept)
      sum += probabilities_[kept];
  }
  while (kept > 1 && probabilities_[kept - 1] < options_.min_p) --kept;
  probabilities_.resize(std::max<size_t>(1, kept));
}

int32_t TokenSampler::draw() {
  const double total = std::accumulate(probabilities_.begin(), probabilities_.end(), 0.0);
  double left = random_.uniform() * total;
  for (size_t i = 0; i < probabilities_.size(); ++i) {
    left -= probabilities_[i];
    if (left < 0) return candidates_[i].id;
  }
  return candidates_[probabilities_.size() - 1].id;
}

}  // namespace kilin
