// SPDX-License-Identifier: Apache-2.0
#include "eval/perplexity.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>

#include "base/error.h"
#include "base/thread_pool.h"

namespace kilin::eval {
namespace {

void check_window(Window window, size_t number, int64_t vocab_size) {
  check(window.size() >= 2, "sequence {}: found {} tokens, expected at least 2", number, window.size());
  for (const int32_t id : window) {
    check(id >= 0 && id < vocab_size, "sequence {}: found token id {}, expected 0 to {}", number, id,
          vocab_size - 1);
  }
}

// Sum of the negative log likelihoods of tokens 2 to n; nothing if progress asked to stop.
std::optional<double> window_loss(LogitSource& source, Window window, int64_t piece, ThreadPool& threads,
                                  const std::function<bool(int64_t)>& predicted) {
  const auto vocab = static_cast<size_t>(source.vocab_size());
  double sum = 0;
  std::vector<double> losses;  // of the tokens of a piece, added in their order whatever the threads
  source.start();
  // The last token only is a target: nothing is predicted after it.
  const auto inputs = static_cast<int64_t>(window.size()) - 1;
  for (int64_t begin = 0; begin < inputs; begin += piece) {
    const int64_t count = std::min(piece, inputs - begin);
    const auto logits = source.append(window.subspan(static_cast<size_t>(begin), static_cast<size_t>(count)));
    KILIN_ASSERT(logits.size() == static_cast<size_t>(count) * vocab);
    losses.resize(static_cast<size_t>(count));
    threads.parallel_for(count, [&](int64_t i, int /*worker*/) {
      const auto row = std::span(logits).subspan(static_cast<size_t>(i) * vocab, vocab);
      losses[static_cast<size_t>(i)] =
          negative_log_likelihood(row, window[static_cast<size_t>(begin + i + 1)]);
    });
    for (const double loss : losses) sum += loss;
    if (predicted && !predicted(begin + count)) return std::nullopt;
  }
  return sum;
}

}  // namespace

int64_t piece_length(int64_t vocab_size) {
  constexpr int64_t kPieceBytes = int64_t{64} << 20;
  constexpr int64_t kMaxPiece = 512;
  return std::clamp<int64_t>(kPieceBytes / (vocab_size * static_cast<int64_t>(sizeof(float))), 1, kMaxPiece);
}

double negative_log_likelihood(std::span<const float> logits, int32_t token) {
  float high = -std::numeric_limits<float>::infinity();
  for (const float x : logits) high = std::max(high, x);
  // Exponentials in float (each within 1e-7 of the largest term: the loss errs by no more), sums in double;
  // four of them, so that the additions of neighbours do not wait for each other.
  double sums[4] = {0, 0, 0, 0};
  for (size_t i = 0; i < logits.size(); ++i) sums[i % 4] += static_cast<double>(std::exp(logits[i] - high));
  const double sum = (sums[0] + sums[1]) + (sums[2] + sums[3]);
  return static_cast<double>(high) + std::log(sum) - static_cast<double>(logits[static_cast<size_t>(token)]);
}

std::vector<Window> cut_windows(std::span<const int32_t> stream, int64_t length, int64_t limit) {
  check(length >= 2, "window: found {}, expected at least 2", length);
  const auto size = static_cast<size_t>(length);
  std::vector<Window> windows;
  for (size_t begin = 0; begin + size <= stream.size(); begin += size) {
    if (limit > 0 && windows.size() == static_cast<size_t>(limit)) break;
    windows.push_back(stream.subspan(begin, size));
  }
  return windows;
}

Perplexity measure_perplexity(LogitSource& source, std::span<const Window> windows,
                              const std::function<bool(int64_t)>& progress, int threads) {
  check(!windows.empty(), "perplexity: found no window to predict, expected at least one");
  for (size_t i = 0; i < windows.size(); ++i) check_window(windows[i], i + 1, source.vocab_size());
  const int64_t piece = piece_length(source.vocab_size());
  ThreadPool workers(threads);
  Perplexity result;
  double sum = 0;
  for (const Window window : windows) {
    const auto predicted = [&](int64_t done) { return !progress || progress(result.tokens + done); };
    const auto loss = window_loss(source, window, piece, workers, predicted);
    if (!loss) break;
    check(std::isfinite(*loss), "sequence {}: the model's logits are not finite", result.windows + 1);
    sum += *loss;
    result.windows += 1;
    result.tokens += static_cast<int64_t>(window.size()) - 1;
  }
  result.loss = result.tokens > 0 ? sum / static_cast<double>(result.tokens) : 0;
  result.perplexity = std::exp(result.loss);
  return result;
}

}  // namespace kilin::eval
