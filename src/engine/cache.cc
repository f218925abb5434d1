// SPDX-License-Identifier: Apache-2.0
#include "engine/cache.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <new>

#include "base/error.h"
#include "kernels/mla/mla.h"

namespace kilin {

static_assert(Cache::kPageTokens % kMlaKeyBlock == 0);

namespace {

constexpr std::align_val_t kPageAlignment{64};

// What saved bytes begin with.
struct SavedHeader {
  uint32_t latent_type;  // saved_type()
  uint32_t reserved = 0;
};

// float16 and float32 by their bits, as in files from before there was bfloat16.
uint32_t saved_type(Dtype dtype) {
  return dtype == Dtype::kBF16 ? 1016 : static_cast<uint32_t>(8 * dtype_size(dtype));
}

// As --cache-type has it.
std::string type_option(uint32_t saved) {
  return saved == saved_type(Dtype::kBF16) ? "bf16" : fmt::format("f{}", saved);
}

}  // namespace

Cache::Cache(const Config& c, Dtype latent_type) : latent_type_(latent_type) {
  check(latent_type == Dtype::kF16 || latent_type == Dtype::kBF16 || latent_type == Dtype::kF32,
        "cache type: found {}, expected F16, BF16 or F32", dtype_name(latent_type));
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
  row_bytes_ = latent_width_ * static_cast<int64_t>(dtype_size(latent_type));
  page_bytes_ = kPageTokens * row_bytes_;  // a multiple of 64: every layer's part is aligned
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
  const auto bytes = static_cast<size_t>(mla_layers_ * page_bytes_);
  auto* memory = static_cast<std::byte*>(::operator new(bytes, kPageAlignment));
  std::memset(memory, 0, bytes);
  return Page(memory, [](std::byte* p) { ::operator delete(p, kPageAlignment); });
}

void Cache::set_page(Latents& latents, size_t index, Page page) const {
  KILIN_ASSERT(index <= latents.pages.size());
  // Should memory end between these, the slot is as before: a page counts when it is in `pages`.
  for (auto& pointers : latents.pointers) pointers.resize(std::max(pointers.size(), index + 1));
  if (index == latents.pages.size()) latents.pages.emplace_back();
  for (int64_t i = 0; i < mla_layers_; ++i) {
    latents.pointers[static_cast<size_t>(i)][index] = page.get() + i * page_bytes_;
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
      std::copy_n(latents.pages[i].get(), mla_layers_ * page_bytes_, own.get());
      set_page(latents, i, std::move(own));
    }
  }
}

std::byte* Cache::row_at(int layer, int32_t slot, int64_t position) const {
  const Latents& latents = latents_[static_cast<size_t>(slot)];
  std::byte* page = latents.pages[static_cast<size_t>(position / kPageTokens)].get();
  return page + linear_index(layer) * page_bytes_ + position % kPageTokens * row_bytes_;
}

void Cache::store_latent(int layer, int32_t slot, int64_t position, const float* row) {
  if (mla_store_row(latent_type_, latent_width_, row, row_at(layer, slot, position))) return;
  const auto larger = [](float a, float b) { return std::abs(a) < std::abs(b) && std::isfinite(b); };
  fail("layer {}: a latent of size {} is beyond {}: use a float32 cache (--cache-type f32)", layer + 1,
       *std::max_element(row, row + latent_width_, larger),
       latent_type_ == Dtype::kF16 ? "float16's 65504" : "bfloat16's 3.39e38");
}

void Cache::load_latent(int layer, int32_t slot, int64_t position, float* row) const {
  mla_load_row(latent_type_, latent_width_, row_at(layer, slot, position), row);
}

const void* const* Cache::pages(int layer, int32_t slot) const {
  return latents_[static_cast<size_t>(slot)].pointers[static_cast<size_t>(linear_index(layer))].data();
}

int64_t Cache::state_bytes() const {
  return (state_stride() + conv_stride()) * static_cast<int64_t>(sizeof(float));
}

int64_t Cache::bytes(int32_t slot) const {
  const auto pages = static_cast<int64_t>(latents_[static_cast<size_t>(slot)].pages.size());
  return state_bytes() + pages * mla_layers_ * page_bytes_;
}

size_t Cache::saved_bytes(int64_t tokens) const {
  return sizeof(SavedHeader) + static_cast<size_t>(state_bytes() + tokens * bytes_per_token());
}

std::vector<std::byte> Cache::save(int32_t slot, int64_t tokens) const {
  std::vector<std::byte> bytes(saved_bytes(tokens));
  std::byte* at = bytes.data();
  const auto put = [&](const void* values, int64_t n) {
    std::memcpy(at, values, static_cast<size_t>(n));
    at += n;
  };
  const SavedHeader header{saved_type(latent_type_)};
  put(&header, sizeof header);
  put(state_.data() + slot * state_stride(), state_stride() * static_cast<int64_t>(sizeof(float)));
  put(conv_.data() + slot * conv_stride(), conv_stride() * static_cast<int64_t>(sizeof(float)));
  const Latents& latents = latents_[static_cast<size_t>(slot)];
  for (const auto& pointers : latents.pointers) {
    for (int64_t t = 0; t < tokens; t += kPageTokens) {
      put(pointers[static_cast<size_t>(t / kPageTokens)], std::min(kPageTokens, tokens - t) * row_bytes_);
    }
  }
  KILIN_ASSERT(at == bytes.data() + bytes.size());
  return bytes;
}

void Cache::check_saved(std::span<const std::byte> bytes) const {
  SavedHeader header{};
  check(bytes.size() >= sizeof header, "sequence checkpoint: found {} bytes, expected at least {}",
        bytes.size(), sizeof header);
  std::memcpy(&header, bytes.data(), sizeof header);
  const uint32_t own = saved_type(latent_type_);
  check(header.latent_type == own,
        "sequence checkpoint: latents in {0}, this model keeps {1} (--cache-type {0} reads it)",
        type_option(header.latent_type), type_option(own));
}

void Cache::load(int32_t slot, int64_t tokens, std::span<const std::byte> bytes) {
  check_saved(bytes);
  KILIN_ASSERT(bytes.size() == saved_bytes(tokens));
  clear(slot);
  reserve(slot, 0, tokens);
  const std::byte* at = bytes.data() + sizeof(SavedHeader);
  const auto get = [&](void* values, int64_t n) {
    std::memcpy(values, at, static_cast<size_t>(n));
    at += n;
  };
  get(state_.data() + slot * state_stride(), state_stride() * static_cast<int64_t>(sizeof(float)));
  get(conv_.data() + slot * conv_stride(), conv_stride() * static_cast<int64_t>(sizeof(float)));
  Latents& latents = latents_[static_cast<size_t>(slot)];
  for (int64_t i = 0; i < mla_layers_; ++i) {
    for (int64_t t = 0; t < tokens; t += kPageTokens) {
      get(latents.pages[static_cast<size_t>(t / kPageTokens)].get() + i * page_bytes_,
          std::min(kPageTokens, tokens - t) * row_bytes_);
    }
  }
}

}  // namespace kilin
