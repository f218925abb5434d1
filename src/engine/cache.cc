// SPDX-License-Identifier: Apache-2.0
#include "engine/cache.h"

#include <algorithm>
#include <cstring>

#include "base/error.h"
#include "kernels/mla/mla.h"

namespace kilin {

static_assert(Cache::kPageTokens % kMlaKeyBlock == 0);

Cache::Cache(const Config& c) {
  for (LayerKind kind : c.layers)
    index_.push_back(kind == LayerKind::kMla ? mla_layers_++ : linear_layers_++);
  if (linear_layers_ > 0) {
    state_floats_ = c.linear.value_heads * c.linear.value_dim * c.linear.key_dim;
    conv_history_ = c.linear.conv_taps - 1;
    qk_channels_ = c.linear.heads * c.linear.key_dim;
    v_channels_ = c.linear.value_heads * c.linear.value_dim;
    conv_floats_ = conv_history_ * (2 * qk_channels_ + v_channels_);
  }
  latent_width_ = c.mla.latent + c.mla.rope;
  page_floats_ = kPageTokens * latent_width_;
}

int32_t Cache::acquire() {
  if (free_.empty()) {
    const size_t slots = latents_.size();
    const size_t grown = slots + std::max<size_t>(1, slots / 2);
    state_.resize(grown * static_cast<size_t>(state_stride()));
    conv_.resize(grown * static_cast<size_t>(conv_stride()));
    latents_.resize(grown);
    for (size_t i = grown; i > slots; --i) free_.push_back(static_cast<int32_t>(i - 1));
  }
  const int32_t slot = free_.back();
  free_.pop_back();
  clear(slot);
  return slot;
}

void Cache::release(int32_t slot) {
  latents_[static_cast<size_t>(slot)] = {};
  free_.push_back(slot);
}

void Cache::clear(int32_t slot) {
  std::fill_n(state_.begin() + slot * state_stride(), state_stride(), 0.0f);
  std::fill_n(conv_.begin() + slot * conv_stride(), conv_stride(), 0.0f);
  Latents& latents = latents_[static_cast<size_t>(slot)];
  latents.pages.clear();
  latents.pointers.assign(static_cast<size_t>(mla_layers_), {});
}

void Cache::copy(int32_t from, int32_t to) {
  std::copy_n(state_.begin() + from * state_stride(), state_stride(), state_.begin() + to * state_stride());
  std::copy_n(conv_.begin() + from * conv_stride(), conv_stride(), conv_.begin() + to * conv_stride());
  latents_[static_cast<size_t>(to)] = latents_[static_cast<size_t>(from)];
}

int64_t Cache::conv_offset(ConvStream stream) const {
  const int64_t which = stream == ConvStream::kQuery ? 0 : stream == ConvStream::kKey ? 1 : 2;
  return which * conv_history_ * qk_channels_;
}

float* Cache::conv(int layer, ConvStream stream) {
  return conv_.data() + linear_index(layer) * conv_floats_ + conv_offset(stream);
}

Cache::Page Cache::new_page() const {
  return Page(new float[static_cast<size_t>(mla_layers_ * page_floats_)]());
}

void Cache::set_page(Latents& latents, size_t index, Page page) const {
  if (index == latents.pages.size()) {
    latents.pages.emplace_back();
    for (auto& pointers : latents.pointers) pointers.push_back(nullptr);
  }
  for (int64_t i = 0; i < mla_layers_; ++i) {
    latents.pointers[static_cast<size_t>(i)][index] = page.get() + i * page_floats_;
  }
  latents.pages[index] = std::move(page);
}

void Cache::reserve(int32_t slot, int64_t from, int64_t tokens) {
  if (mla_layers_ == 0 || from >= tokens) return;
  Latents& latents = latents_[static_cast<size_t>(slot)];
  const auto first = static_cast<size_t>(from / kPageTokens);
  const auto last = static_cast<size_t>((tokens - 1) / kPageTokens);
  for (size_t i = first; i <= last; ++i) {
    if (i >= latents.pages.size()) {
      set_page(latents, i, new_page());
    } else if (latents.pages[i].use_count() > 1) {
      Page own = new_page();
      std::copy_n(latents.pages[i].get(), mla_layers_ * page_floats_, own.get());
      set_page(latents, i, std::move(own));
    }
  }
}

float* Cache::latent_row(int layer, int32_t slot, int64_t position) {
  const Latents& latents = latents_[static_cast<size_t>(slot)];
  float* page = latents.pages[static_cast<size_t>(position / kPageTokens)].get();
  return page + linear_index(layer) * page_floats_ + position % kPageTokens * latent_width_;
}

const float* const* Cache::pages(int layer, int32_t slot) const {
  return latents_[static_cast<size_t>(slot)].pointers[static_cast<size_t>(linear_index(layer))].data();
}

int64_t Cache::state_bytes() const {
  return (state_stride() + conv_stride()) * static_cast<int64_t>(sizeof(float));
}

int64_t Cache::bytes(int32_t slot) const {
  const auto pages = static_cast<int64_t>(latents_[static_cast<size_t>(slot)].pages.size());
  return state_bytes() + pages * mla_layers_ * page_floats_ * static_cast<int64_t>(sizeof(float));
}

size_t Cache::saved_bytes(int64_t tokens) const {
  return static_cast<size_t>(state_bytes() + tokens * bytes_per_token());
}

std::vector<std::byte> Cache::save(int32_t slot, int64_t tokens) const {
  std::vector<std::byte> bytes(saved_bytes(tokens));
  std::byte* at = bytes.data();
  const auto put = [&](const float* values, int64_t n) {
    std::memcpy(at, values, static_cast<size_t>(n) * sizeof(float));
    at += static_cast<size_t>(n) * sizeof(float);
  };
  put(state_.data() + slot * state_stride(), state_stride());
  put(conv_.data() + slot * conv_stride(), conv_stride());
  const Latents& latents = latents_[static_cast<size_t>(slot)];
  for (const auto& pointers : latents.pointers) {
    for (int64_t t = 0; t < tokens; t += kPageTokens) {
      put(pointers[static_cast<size_t>(t / kPageTokens)], std::min(kPageTokens, tokens - t) * latent_width_);
    }
  }
  KILIN_ASSERT(at == bytes.data() + bytes.size());
  return bytes;
}

void Cache::load(int32_t slot, int64_t tokens, std::span<const std::byte> bytes) {
  KILIN_ASSERT(bytes.size() == saved_bytes(tokens));
  clear(slot);
  reserve(slot, 0, tokens);
  const std::byte* at = bytes.data();
  const auto get = [&](float* values, int64_t n) {
    std::memcpy(values, at, static_cast<size_t>(n) * sizeof(float));
    at += static_cast<size_t>(n) * sizeof(float);
  };
  get(state_.data() + slot * state_stride(), state_stride());
  get(conv_.data() + slot * conv_stride(), conv_stride());
  Latents& latents = latents_[static_cast<size_t>(slot)];
  for (int64_t i = 0; i < mla_layers_; ++i) {
    for (int64_t t = 0; t < tokens; t += kPageTokens) {
      get(latents.pages[static_cast<size_t>(t / kPageTokens)].get() + i * page_floats_,
          std::min(kPageTokens, tokens - t) * latent_width_);
    }
  }
}

}  // namespace kilin
