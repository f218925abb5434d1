// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <array>
#include <cstring>

#include "base/error.h"
#include "engine/api_impl.h"

namespace kilin {

Sequence::Impl::Impl(std::shared_ptr<Model::Impl> owner) : model(std::move(owner)) {
  std::lock_guard lock(model->mutex);
  slot = model->engine.cache().acquire();
}

Sequence::Impl::~Impl() {
  std::lock_guard lock(model->mutex);
  model->engine.cache().release(slot);
}

void Sequence::Impl::clear() {
  model->engine.cache().clear(slot);
  length = 0;
  logits.clear();
}

std::span<const float> Sequence::Impl::forward(const Batch& batch, std::span<Impl* const> moved) {
  try {
    return moved.front()->model->engine.forward(batch);
  } catch (...) {
    for (Impl* s : moved) s->clear();
    throw;
  }
}

std::span<const float> Sequence::Impl::forward(std::span<const int32_t> tokens, bool all_logits) {
  const auto count = static_cast<int32_t>(tokens.size());
  const std::array<int32_t, 2> cu_seqlens{0, count};
  std::vector<int32_t> wanted;
  for (int32_t i = all_logits ? 0 : count - 1; i < count; ++i) wanted.push_back(i);
  Impl* self = this;
  return forward({tokens, cu_seqlens, std::span(&slot, 1), std::span(&length, 1), wanted},
                 std::span(&self, 1));
}

Sequence::Sequence(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
Sequence::Sequence(Sequence&&) noexcept = default;
Sequence& Sequence::operator=(Sequence&&) noexcept = default;
Sequence::~Sequence() = default;

Sequence Model::new_sequence() const { return Sequence(std::make_unique<Sequence::Impl>(impl_)); }

int64_t Sequence::prefill(std::span<const int32_t> tokens, const std::function<bool(int64_t)>& progress) {
  Impl& s = *impl_;
  s.model->check_tokens(tokens, s.length);
  const auto chunk = static_cast<size_t>(s.model->options.prefill_chunk);
  size_t done = 0;
  while (done < tokens.size()) {
    const auto part = tokens.subspan(done, std::min(chunk, tokens.size() - done));
    {
      std::lock_guard lock(s.model->mutex);
      const auto logits = s.forward(part, false);
      s.logits.assign(logits.begin(), logits.end());
      s.length += static_cast<int64_t>(part.size());
    }
    done += part.size();
    if (progress && !progress(static_cast<int64_t>(done))) break;
  }
  return static_cast<int64_t>(done);
}

void Sequence::decode(int32_t token) { prefill(std::span(&token, 1)); }

std::span<const float> Sequence::logits() const { return impl_->logits; }

std::vector<float> Sequence::prefill_all_logits(std::span<const int32_t> tokens) {
  Impl& s = *impl_;
  s.model->check_tokens(tokens, s.length);
  const auto vocab = static_cast<size_t>(s.model->info.vocab_size);
  const auto chunk = static_cast<size_t>(s.model->options.prefill_chunk);
  std::vector<float> all;
  all.reserve(tokens.size() * vocab);
  std::lock_guard lock(s.model->mutex);
  for (size_t done = 0; done < tokens.size(); done += chunk) {
    const auto part = tokens.subspan(done, std::min(chunk, tokens.size() - done));
    const auto logits = s.forward(part, true);
    all.insert(all.end(), logits.begin(), logits.end());
    s.length += static_cast<int64_t>(part.size());
  }
  if (!all.empty()) s.logits.assign(all.end() - static_cast<std::ptrdiff_t>(vocab), all.end());
  return all;
}

int64_t Sequence::length() const { return impl_->length; }

int64_t Sequence::bytes() const {
  std::lock_guard lock(impl_->model->mutex);
  return impl_->model->engine.cache().bytes(impl_->slot);
}

Sequence Sequence::copy() const {
  auto other = std::make_unique<Impl>(impl_->model);
  std::lock_guard lock(impl_->model->mutex);
  impl_->model->engine.cache().copy(impl_->slot, other->slot);
  other->length = impl_->length;
  other->logits = impl_->logits;
  return Sequence(std::move(other));
}

void Sequence::clear() {
  std::lock_guard lock(impl_->model->mutex);
  impl_->clear();
}

namespace {

// A checkpoint is this header, the cache's bytes, and the logits if there are any.
struct CheckpointHeader {
  std::array<char, 8> magic{'K', 'I', 'L', 'I', 'N', 'S', 'Q', '2'};
  uint64_t shape = 0;  // of the model
  int64_t length = 0;
  int64_t logits = 0;
};

// FNV-1a over everything that decides the layout of a state.
uint64_t shape_fingerprint(const Config& c) {
  uint64_t hash = 14695981039346656037ull;
  const auto mix = [&](int64_t value) {
    for (int i = 0; i < 8; ++i)
      hash = (hash ^ (static_cast<uint64_t>(value) >> (8 * i) & 0xff)) * 1099511628211ull;
  };
  for (LayerKind kind : c.layers) mix(static_cast<int64_t>(kind));
  for (int64_t v : {c.hidden, c.vocab_size, c.linear.heads, c.linear.value_heads, c.linear.key_dim,
                    c.linear.value_dim, c.linear.conv_taps, c.mla.latent, c.mla.rope}) {
    mix(v);
  }
  return hash;
}

}  // namespace

std::vector<std::byte> Sequence::checkpoint() const {
  const Impl& s = *impl_;
  std::lock_guard lock(s.model->mutex);
  CheckpointHeader header;
  header.shape = shape_fingerprint(s.model->engine.config());
  header.length = s.length;
  header.logits = static_cast<int64_t>(s.logits.size());
  const auto cache = s.model->engine.cache().save(s.slot, s.length);
  const size_t logit_bytes = s.logits.size() * sizeof(float);
  std::vector<std::byte> bytes(sizeof header + cache.size() + logit_bytes);
  std::memcpy(bytes.data(), &header, sizeof header);
  std::memcpy(bytes.data() + sizeof header, cache.data(), cache.size());
  if (logit_bytes > 0) std::memcpy(bytes.data() + sizeof header + cache.size(), s.logits.data(), logit_bytes);
  return bytes;
}

void Sequence::restore(std::span<const std::byte> bytes) {
  Impl& s = *impl_;
  std::lock_guard lock(s.model->mutex);
  CheckpointHeader header;
  check(bytes.size() >= sizeof header, "sequence checkpoint: found {} bytes, expected at least {}",
        bytes.size(), sizeof header);
  std::memcpy(&header, bytes.data(), sizeof header);
  const Config& config = s.model->engine.config();
  check(header.magic == CheckpointHeader{}.magic, "sequence checkpoint: does not begin with KILINSQ2");
  check(header.shape == shape_fingerprint(config), "sequence checkpoint: made with a model of another shape");
  check(header.length >= 0 && header.length <= config.max_length,
        "sequence checkpoint: found length {}, expected 0 to {}", header.length, config.max_length);
  check(header.logits == (header.length > 0 ? config.vocab_size : 0),
        "sequence checkpoint: found {} logits, expected {}", header.logits,
        header.length > 0 ? config.vocab_size : 0);
  s.model->engine.cache().check_saved(bytes.subspan(sizeof header));
  const size_t cache_bytes = s.model->engine.cache().saved_bytes(header.length);
  const size_t expected = sizeof header + cache_bytes + static_cast<size_t>(header.logits) * sizeof(float);
  check(bytes.size() == expected, "sequence checkpoint: found {} bytes, expected {} for {} tokens",
        bytes.size(), expected, header.length);
  try {
    s.model->engine.cache().load(s.slot, header.length, bytes.subspan(sizeof header, cache_bytes));
    s.logits.resize(static_cast<size_t>(header.logits));
  } catch (...) {  // out of memory: no past is better than half of one
    s.clear();
    throw;
  }
  if (header.logits > 0) {
    std::memcpy(s.logits.data(), bytes.data() + sizeof header + cache_bytes, s.logits.size() * sizeof(float));
  }
  s.length = header.length;
}

}  // namespace kilin
