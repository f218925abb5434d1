// SPDX-License-Identifier: Apache-2.0
// What sequences carry from token to token, by slot: fp32 states of KDA/GDN layers (V x K per head) and the
// last inputs of their convolutions, both constant in length, and the latents of MLA layers (float16,
// bfloat16, or float32 to be exact) in pages of kPageTokens rows. Pages are shared between copies of a
// sequence until one of them writes.
#pragma once
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "base/huge_memory.h"
#include "model/config.h"
#include "model/ops.h"
#include "tensor/dtype.h"

namespace kilin {

class Cache {
 public:
  static constexpr int64_t kPageTokens = 256;

  // latent_type: kF16, kBF16 or kF32; throws Error for another.
  explicit Cache(const Config& config, Dtype latent_type = Dtype::kF16);

  int32_t acquire();  // a slot without a past
  void release(int32_t slot);
  void clear(int32_t slot);
  void copy(int32_t from, int32_t to);

  // KDA/GDN state of slot s at state(layer) + s * state_stride(), [value_heads][value_dim][key_dim].
  float* state(int layer) { return state_.data() + linear_index(layer) * state_floats_; }
  int64_t state_stride() const { return linear_layers_ * state_floats_; }
  // Convolution inputs of slot s at conv(layer, stream) + s * conv_stride(), [taps - 1][channels].
  float* conv(int layer, ConvStream stream);
  int64_t conv_stride() const { return linear_layers_ * conv_floats_; }

  // Makes rows [0, tokens) of a slot writable from row `from` on.
  void reserve(int32_t slot, int64_t from, int64_t tokens);
  // Writes a row of latent_width() floats in the cache's type. Throws Error for a finite value that this type
  // cannot hold.
  void store_latent(int layer, int32_t slot, int64_t position, const float* row);
  void load_latent(int layer, int32_t slot, int64_t position, float* row) const;
  // Page pointers of an MLA layer, for kernels/mla.
  const void* const* pages(int layer, int32_t slot) const;
  int64_t latent_width() const { return latent_width_; }
  Dtype latent_type() const { return latent_type_; }

  int64_t state_bytes() const;  // of one sequence, constant part
  int64_t bytes_per_token() const { return mla_layers_ * row_bytes_; }
  int64_t bytes(int32_t slot) const;

  // The past of a slot with `tokens` tokens as bytes, and back (same shape and token count). The bytes begin
  // with the type of the latents; check_saved throws Error if it is not this cache's.
  std::vector<std::byte> save(int32_t slot, int64_t tokens) const;
  void load(int32_t slot, int64_t tokens, std::span<const std::byte> bytes);
  void check_saved(std::span<const std::byte> bytes) const;
  size_t saved_bytes(int64_t tokens) const;

 private:
  using Page = std::shared_ptr<std::byte>;
  struct Latents {
    std::vector<Page> pages;                         // each [mla_layers][page_bytes_]
    std::vector<std::vector<const void*>> pointers;  // [mla_layers][pages]
  };
  int64_t linear_index(int layer) const { return index_[static_cast<size_t>(layer)]; }
  int64_t conv_offset(ConvStream stream) const;
  std::byte* row_at(int layer, int32_t slot, int64_t position) const;
  Page new_page() const;
  void set_page(Latents& latents, size_t index, Page page) const;

  int64_t linear_layers_ = 0, mla_layers_ = 0;
  int64_t state_floats_ = 0, conv_floats_ = 0, qk_channels_ = 0, v_channels_ = 0, conv_history_ = 0;
  Dtype latent_type_;
  int64_t latent_width_ = 0, row_bytes_ = 0, page_bytes_ = 0;
  std::vector<int64_t> index_;  // [layers] position among the layers of its sort
  HugeVector<float> state_, conv_;
  std::vector<Latents> latents_;
  std::vector<int32_t> free_;
};

}  // namespace kilin
