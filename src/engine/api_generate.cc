// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <chrono>

#include "base/error.h"
#include "engine/api_impl.h"
#include "engine/stop_scanner.h"
#include "text/stream_decoder.h"

namespace kilin {

Sampler::Sampler(const SamplingOptions& options) : impl_(new Impl{TokenSampler(options)}) {}
Sampler::~Sampler() = default;
Sampler::Sampler(Sampler&&) noexcept = default;
Sampler& Sampler::operator=(Sampler&&) noexcept = default;
void Sampler::accept(int32_t token) { impl_->sampler.accept(token); }
int32_t Sampler::sample(std::span<const float> logits) { return impl_->sampler.sample(logits); }

namespace {

double seconds_since(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

// Tokens to printable text: whole characters, stop texts cut off.
class TextStream {
 public:
  TextStream(const text::Tokenizer* tokenizer, const GenerateOptions& options)
      : scanner_(options.stop), on_text_(options.on_text) {
    if (tokenizer != nullptr) decoder_.emplace(*tokenizer, true);
    check(tokenizer != nullptr || options.stop.empty(),
          "stop: texts need a tokenizer, and the model has none");
  }
  void push(int32_t token) {
    if (decoder_) emit(scanner_.push(decoder_->push(token)));
  }
  void finish() {
    if (!decoder_) return;
    emit(scanner_.push(decoder_->flush()));
    emit(scanner_.flush());
  }
  bool stopped() const { return scanner_.stopped(); }
  bool cancelled() const { return cancelled_; }
  std::string take() { return std::move(text_); }

 private:
  void emit(const std::string& piece) {
    if (piece.empty()) return;
    text_ += piece;
    if (on_text_ && !on_text_(piece)) cancelled_ = true;
  }
  std::optional<text::StreamDecoder> decoder_;
  StopScanner scanner_;
  const std::function<bool(std::string_view)>& on_text_;
  std::string text_;
  bool cancelled_ = false;
};

}  // namespace

GenerateResult Model::generate(Sequence& sequence, std::span<const int32_t> prompt,
                               const GenerateOptions& options) const {
  check(options.max_tokens >= 0, "max tokens: found {}, expected 0 or more", options.max_tokens);
  check(sequence.impl_->model == impl_, "generate: the sequence belongs to another model");
  check(!prompt.empty() || sequence.length() > 0, "prompt: found no tokens, expected at least one");
  const int64_t limit = impl_->info.max_length;
  const int64_t total = sequence.length() + static_cast<int64_t>(prompt.size());
  check(total <= limit, "prompt: found {} tokens, expected at most {} (model_max_length in config.json)",
        total, limit);
  GenerateResult result;
  result.prompt_tokens = static_cast<int64_t>(prompt.size());
  result.finish_reason = "length";
  TextStream stream(impl_->tokenizer ? &*impl_->tokenizer : nullptr, options);
  TokenSampler sampler(options.sampling);
  for (int32_t id : options.seen) sampler.accept(id);
  for (int32_t id : prompt) sampler.accept(id);
  const auto prefill_start = std::chrono::steady_clock::now();
  bool cancelled = false;
  result.prefilled_tokens = sequence.prefill(prompt, [&](int64_t done) {
    cancelled = options.on_prefill && !options.on_prefill(done);
    return !cancelled;
  });
  result.prefill_seconds = seconds_since(prefill_start);
  const auto decode_start = std::chrono::steady_clock::now();
  while (!cancelled && static_cast<int64_t>(result.ids.size()) < options.max_tokens) {
    const int32_t id = sampler.sample(sequence.logits());
    sampler.accept(id);
    result.ids.push_back(id);
    const bool end = std::find(impl_->end_ids.begin(), impl_->end_ids.end(), id) != impl_->end_ids.end();
    if (!end || options.ignore_end_tokens) stream.push(id);
    cancelled = stream.cancelled() || (options.on_token && !options.on_token(id));
    if ((end && !options.ignore_end_tokens) || stream.stopped()) {
      result.finish_reason = "stop";
      break;
    }
    // The last token needs no logits behind it, unless the caller goes on with the sequence: it is left out
    // here, and the sequence holds all tokens but the last one generated.
    if (static_cast<int64_t>(result.ids.size()) == options.max_tokens || cancelled) break;
    if (sequence.length() >= limit) break;
    sequence.decode(id);
  }
  stream.finish();
  if (cancelled || stream.cancelled()) result.finish_reason = "cancelled";
  result.decode_seconds = seconds_since(decode_start);
  result.text = stream.take();
  return result;
}

}  // namespace kilin
