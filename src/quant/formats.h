// SPDX-License-Identifier: Apache-2.0
// Stored formats of weights: how ggml lays out the blocks of Q8_0, Q5_0, Q4_0, Q4_K and Q6_K, and the plain
// float types beside them, so that a caller can treat every weight type alike. Layouts are those of ggml's
// ggml-common.h; all scalars little-endian.
#pragma once
#include <cstddef>
#include <cstdint>

#include "base/float16.h"
#include "tensor/dtype.h"

namespace kilin::quant {

// NOLINTBEGIN(readability-identifier-naming): the formats' own names
// 32 elements: x_i = d q_i
struct BlockQ8_0 {
  uint16_t d;  // float16 bits
  int8_t q[32];
};
// 32 elements: x_i = d (n_i - 16); the low four bits of n as in Q4_0, the fifth of n_i is bit i of high (the
// four bytes are one little-endian integer)
struct BlockQ5_0 {
  uint16_t d;
  uint8_t high[4];
  uint8_t q[16];
};
// 32 elements: x_i = d (n_i - 8); byte j holds n_j in its low and n_(j+16) in its high four bits
struct BlockQ4_0 {
  uint16_t d;
  uint8_t q[16];
};
// 256 elements in 8 parts of 32: x_i = d scale_p n_i - dmin min_p. Scales and mins have 6 bits each, packed
// as scale_min() reads them; bytes q[32 j + i] hold n of element i of part 2 j (low four bits) and 2 j + 1
// (high).
struct BlockQ4_K {
  uint16_t d;
  uint16_t dmin;
  uint8_t scales[12];
  uint8_t q[128];
};
// 256 elements in 16 parts of 16: x_i = d scale_p (n_i - 32). Per half of 128 elements (64 bytes of low, 32
// of high), element i < 32 of quarter t takes four bits of low[i + 32 (t % 2)] (low ones for t < 2) and bits
// 2 t of high[i].
struct BlockQ6_K {
  uint8_t low[128];
  uint8_t high[64];
  int8_t scales[16];
  uint16_t d;
};
// NOLINTEND(readability-identifier-naming)
static_assert(sizeof(BlockQ8_0) == 34 && sizeof(BlockQ5_0) == 22 && sizeof(BlockQ4_0) == 18 &&
              sizeof(BlockQ4_K) == 144 && sizeof(BlockQ6_K) == 210);

// The 6-bit scale and min of part p (0 to 7) of a Q4_K block.
struct ScaleMin {
  uint8_t scale, min;
};
inline ScaleMin scale_min(const uint8_t (&s)[12], int p) {
  if (p < 4) return {static_cast<uint8_t>(s[p] & 63), static_cast<uint8_t>(s[p + 4] & 63)};
  return {static_cast<uint8_t>((s[p + 4] & 15) | (s[p - 4] >> 6 << 4)),
          static_cast<uint8_t>((s[p + 4] >> 4) | (s[p] >> 6 << 4))};
}

// Whether weights of this type can be read (F32, F16, BF16, Q8_0, Q5_0, Q4_0, Q4_K, Q6_K) and written (all of
// those but Q5_0 and Q6_K).
bool readable(Dtype dtype);
bool writable(Dtype dtype);

// out[0, n) = the elements as float32 (exact for every type but Q4_K and Q6_K, which round once per product
// as ggml does). n is a multiple of dtype_block(dtype); `data` need not be aligned.
void dequantize(Dtype dtype, const void* data, int64_t n, float* out);

// n elements of Q5_0 as Q8_0, exactly: the same d, and q_i = n_i - 16. n is a multiple of 32.
void q5_0_to_q8_0(const void* data, int64_t n, void* out);

// The nearest blocks for x[0, n), by the same search as ggml's reference quantiser (ggml-quants.c,
// quantize_row_*_ref), bit for bit. x must be finite: an Error otherwise, or when a value does not fit the
// type (float16 scale overflow).
void quantize(Dtype dtype, const float* x, int64_t n, void* out);

// A bound of |x_i - x'_i| over the block of dtype_block(dtype) finite elements at x, of a type that can be
// written: half a step and the rounding of the scales; for Q4_0 also the end that its 16 levels cannot reach,
// for Q4_K what its search may clip (a sure bound, some four half steps for normal data).
double error_bound(Dtype dtype, const float* x);

}  // namespace kilin::quant
