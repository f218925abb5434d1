// SPDX-License-Identifier: Apache-2.0
// Private to kernels/mla, compiled once per instruction set: the online softmax, register tiles of products,
// cache rows as float32.
#pragma once
#include "kernels/cpu/vec.h"
#include "kernels/mla/mla_isa.h"

namespace kilin::KILIN_ISA {

inline constexpr float kMinusInfinity = -__builtin_inff();

KILIN_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// e^x for x <= 0 within 2 ulp, 0 below -87.3 and for minus infinity: exp() of vec.h without its upper range.
KILIN_INLINE Vec exp_down(Vec x) {
  const Vec lowest = splat(-87.33654f);
  const Vec magic = splat(12582912.0f);
  Vec r = x < lowest ? lowest : x;
  const Vec shifted = r * splat(1.44269504f) + magic;
  const Vec n = shifted - magic;
  r = r - n * splat(0.693359375f);
  r = r - n * splat(-2.12194440e-4f);
  Vec p = splat(1.9875691500e-4f);
  p = p * r + splat(1.3981999507e-3f);
  p = p * r + splat(8.3334519073e-3f);
  p = p * r + splat(4.1665795894e-2f);
  p = p * r + splat(1.6666665459e-1f);
  p = p * r + splat(5.0000001201e-1f);
  p = p * (r * r) + (r + splat(1.0f));
  // the low bits of `shifted` are n: moved up by 23 they are the exponent of 2^n, but for the bias
  const Vec power = reinterpret_cast<Vec>((reinterpret_cast<VecInt>(shifted) << 23) + (127 << 23));
  return x < lowest ? zero() : p * power;
}

KILIN_INLINE float exp_one(float x) { return exp_down(splat(x))[0]; }

// One step of the online softmax of a row: scores[0..n) become e^(score * scale - top), the rest of the row
// up to `width`, a multiple of kLanes, becomes 0; `top` and `sum` move on. Returns the factor for what was
// summed before.
KILIN_INLINE float softmax_step(int64_t n, int64_t width, float scale, float* scores, float& top,
                                float& sum) {
  if (n <= 0) {  // the query lies before all of these keys
    for (int64_t i = 0; i < width; i += kLanes) store(scores + i, zero());
    return 1.0f;
  }
  for (int64_t i = n; i < width; ++i) scores[i] = kMinusInfinity;
  Vec best = load(scores);
  for (int64_t i = kLanes; i < width; i += kLanes) best = max(best, load(scores + i));
  const float highest = reduce_max(best) * scale;
  const float new_top = highest > top ? highest : top;
  const Vec shift = splat(new_top);
  const Vec factor = splat(scale);
  Vec total = zero();
  for (int64_t i = 0; i < width; i += kLanes) {
    const Vec e = exp_down(load(scores + i) * factor - shift);
    store(scores + i, e);
    total += e;
  }
  const float correction = new_top > top ? exp_one(top - new_top) : 1.0f;
  sum = sum * correction + reduce_add(total);
  top = new_top;
  return correction;
}

KILIN_INLINE void scale_row(int64_t n, float factor, float* x) {
  const Vec f = splat(factor);
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(x + i, load(x + i) * f);
  if (i < n) store_part(x + i, load_part(x + i, static_cast<int>(n - i)) * f, static_cast<int>(n - i));
}

// width floats of a cache row to `to`, zeros behind them up to a whole vector of the widest set
KILIN_INLINE void widen_row(Dtype type, int64_t width, const char* from, float* to) {
  int64_t c = 0;
  if (type == Dtype::kF16) {
    for (; c + kLanes <= width; c += kLanes) store(to + c, load_f16(from + c * 2));
    if (c < width) store(to + c, load_f16_part(from + c * 2, static_cast<int>(width - c)));
  } else if (type == Dtype::kBF16) {
    for (; c + kLanes <= width; c += kLanes) store(to + c, load_bf16(from + c * 2));
    if (c < width) {
      VecHalfBits part{};
      std::memcpy(&part, from + c * 2, static_cast<unsigned>(width - c) * 2u);
      store(to + c, load_bf16(&part));
    }
  } else {
    for (; c + kLanes <= width; c += kLanes) {
      Vec v;
      std::memcpy(&v, from + c * 4, sizeof v);
      store(to + c, v);
    }
    if (c < width) {
      Vec v{};
      std::memcpy(&v, from + c * 4, static_cast<unsigned>(width - c) * 4u);
      store(to + c, v);
    }
  }
  if (c < width) c += kLanes;
  for (; c < mla_padded(width); c += kLanes) store(to + c, zero());
}

// lane i of the result = the sum of the lanes of v[i]
template <int kCount>
KILIN_INLINE Vec reduce_lanes(const Vec (&v)[kCount]) {
  if constexpr (kCount == 1) {
    return v[0];
  } else {
    Vec half[kCount / 2];
#pragma GCC unroll 8
    for (int i = 0; i < kCount / 2; ++i) {
      half[i] = interleave_low(v[i], v[i + kCount / 2]) + interleave_high(v[i], v[i + kCount / 2]);
    }
    return reduce_lanes(half);
  }
}

}  // namespace kilin::KILIN_ISA
