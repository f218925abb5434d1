// SPDX-License-Identifier: Apache-2.0
#include "kernels/mla/mla.h"

#include <cmath>
#include <cstring>

#include "base/cpu.h"
#include "base/error.h"
#include "base/float16.h"
#include "kernels/mla/mla_amx.h"
#include "kernels/mla/mla_isa.h"
#include "kernels/mla/mla_orders.h"

namespace kilin {
namespace {

void validate(const MlaParams& p) {
  check(p.cache_type == Dtype::kF16 || p.cache_type == Dtype::kBF16 || p.cache_type == Dtype::kF32,
        "mla: cache type is {}, expected F16, BF16 or F32", dtype_name(p.cache_type));
  check(p.page_tokens > 0 && p.page_tokens % kMlaKeyBlock == 0,
        "mla: page size is {}, expected a multiple of {}", p.page_tokens, kMlaKeyBlock);
  check(p.page_stride >= p.latent + p.rope, "mla: page stride is {}, expected at least {}", p.page_stride,
        p.latent + p.rope);
}

// Pairs of a query and a key that it sees.
double pairs(const MlaSequence& s) {
  const auto count = static_cast<double>(s.count);
  return count * static_cast<double>(s.past) + count * (count + 1) / 2;
}

// The nearest; false if a finite value became infinite.
bool store_bfloats(int64_t n, const float* row, void* to) {
  bool fits = true;
  for (int64_t i = 0; i < n; ++i) {
    const BFloat16 rounded = to_bfloat16(row[i]);
    fits &= std::isfinite(to_float(rounded)) || !std::isfinite(row[i]);
    std::memcpy(static_cast<char*>(to) + 2 * i, &rounded, sizeof rounded);
  }
  return fits;
}

}  // namespace

bool mla_rounds(Dtype weights, Activations activations) {
  return rounds(weights, activations) && fast_bf16_products();
}

// Per key and head, `count` queries cost count (2 latent + rope) multiply-adds absorbed, and count (nope +
// rope + value) + (nope + value) latent expanded. These run at the same speed, but for AMX, which has the
// first and the last product and not the attention between expanded keys: 2.2 and 2.75 times as fast as that
// (measured with 8 and 32 heads: docs/notes/20261124-mla-cpu.md). Rounded, the first runs at three quarters
// of the speed of the second (docs/notes/20261126-cpu-attention-bf16.md), at seven eighths with a bfloat16
// cache, whose rows need no conversion.
int64_t mla_expand_threshold(const MlaParams& p) {
  bool amx = false;
#if defined(__x86_64__)
  amx = active_isa() == Isa::kAmx && amx::mla_fits(p);
#endif
  double speed = amx ? 2.2 : 1.0;
  if (p.value_up != nullptr && mla_rounds(p.value_up->dtype, p.activations))
    speed = p.cache_type == Dtype::kBF16 ? 0.875 : 0.75;
  const double absorbed = static_cast<double>(2 * p.latent + p.rope) / speed;
  const auto expanded = static_cast<double>(p.nope + p.rope + p.value);
  const double once = static_cast<double>((p.nope + p.value) * p.latent) / (amx ? 2.75 : 1.0);
  return absorbed <= expanded ? INT64_MAX : static_cast<int64_t>(once / (absorbed - expanded)) + 1;
}

void mla_absorbed(const MlaParams& p, const MlaSequence& s, ThreadPool& pool) {
  validate(p);
  mla_absorb(p, &s, 1, pool);
}

void mla_expanded(const MlaParams& p, const MlaSequence& s, ThreadPool& pool) {
  validate(p);
  mla_expand(p, s, pool);
}

void mla_attention(const MlaParams& p, ThreadPool& pool) {
  validate(p);
  const int64_t threshold = mla_expand_threshold(p);
  for (int64_t i = 0; i < p.sequences;) {
    if (p.sequence[i].count >= threshold) {
      mla_expand(p, p.sequence[i++], pool);
      continue;
    }
    // neighbours of few queries together
    const int64_t begin = i;
    while (i < p.sequences && p.sequence[i].count < threshold &&
           (i == begin || p.sequence[i].first == p.sequence[i - 1].first + p.sequence[i - 1].count)) {
      ++i;
    }
    mla_absorb(p, p.sequence + begin, i - begin, pool);
  }
}

double mla_absorbed_flops(const MlaParams& p, const MlaSequence& s) {
  const auto heads = static_cast<double>(p.heads);
  const auto projected = static_cast<double>(s.count * p.latent * (p.nope + p.value));
  return 2 * heads * (pairs(s) * static_cast<double>(2 * p.latent + p.rope) + projected);
}

double mla_expanded_flops(const MlaParams& p, const MlaSequence& s) {
  const auto heads = static_cast<double>(p.heads);
  const auto expanded = static_cast<double>((s.past + s.count) * p.latent * (p.nope + p.value));
  return 2 * heads * (pairs(s) * static_cast<double>(p.nope + p.rope + p.value) + expanded);
}

double mla_cache_bytes(const MlaParams& p, const MlaSequence& s) {
  return static_cast<double>((s.past + s.count) * (p.latent + p.rope)) *
         static_cast<double>(dtype_size(p.cache_type));
}

bool mla_store_row(Dtype type, int64_t width, const float* row, void* to) {
  if (type == Dtype::kF16) return KILIN_DISPATCH(mla_store_half)(width, row, to);
  if (type == Dtype::kBF16) return store_bfloats(width, row, to);
  std::memcpy(to, row, static_cast<size_t>(width) * sizeof(float));
  return true;
}

void mla_load_row(Dtype type, int64_t width, const void* from, float* row) {
  const char* at = static_cast<const char*>(from);
  for (int64_t i = 0; i < width; ++i) {
    if (type == Dtype::kF16) {
      Float16 half{};
      std::memcpy(&half, at + 2 * i, sizeof half);
      row[i] = to_float(half);
    } else if (type == Dtype::kBF16) {
      BFloat16 half{};
      std::memcpy(&half, at + 2 * i, sizeof half);
      row[i] = to_float(half);
    } else {
      std::memcpy(row + i, at + 4 * i, sizeof(float));
    }
  }
}

void rope_interleaved(int64_t rows, int64_t dim, double theta, const int64_t* positions, float* x,
                      int64_t stride) {
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t i = 0; i + 1 < dim; i += 2) {
      const double angle = static_cast<double>(positions[r]) *
                           std::pow(theta, -static_cast<double>(i) / static_cast<double>(dim));
      const auto c = static_cast<float>(std::cos(angle));
      const auto s = static_cast<float>(std::sin(angle));
      float* pair = x + r * stride + i;
      const float a = pair[0];
      const float b = pair[1];
      pair[0] = a * c - b * s;
      pair[1] = a * s + b * c;
    }
  }
}

}  // namespace kilin
