// SPDX-License-Identifier: Apache-2.0
// Perplexity: exp of the mean negative log likelihood of the predicted tokens. In a window of n tokens the
// tokens 2 to n are predicted, each from those before it in the same window; windows do not see each other.
#pragma once
#include <cstdint>
#include <functional>
#include <span>
#include <vector>

#include "eval/logit_source.h"

namespace kilin::eval {

using Window = std::span<const int32_t>;

struct Perplexity {
  double loss = 0;        // mean negative log likelihood, in nats
  double perplexity = 0;  // e^loss
  int64_t tokens = 0;     // predicted tokens
  int64_t windows = 0;
};

// -log softmax(logits)[token], within 1e-6; the sum of exponentials is a double.
double negative_log_likelihood(std::span<const float> logits, int32_t token);

// Cuts a stream into windows of `length` tokens that do not overlap; the last partial one is left out.
// At most `limit` windows; 0: all. Throws Error if length < 2.
std::vector<Window> cut_windows(std::span<const int32_t> stream, int64_t length, int64_t limit = 0);

// Throws Error when there are no windows, when one has fewer than two tokens or a token outside the
// vocabulary, and when a logit is not finite. `progress` hears the number of predicted tokens so far;
// returning false stops, and the result covers the windows finished by then. `threads` take the likelihoods
// from the logits (their number changes no bit); the model has its own.
Perplexity measure_perplexity(LogitSource& source, std::span<const Window> windows,
                              const std::function<bool(int64_t tokens)>& progress = {}, int threads = 1);

}  // namespace kilin::eval
