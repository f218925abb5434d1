// SPDX-License-Identifier: Apache-2.0
// The quantisers of one block each; formats.cc checks their input (finite) before it calls them.
#pragma once
#include "quant/formats.h"

namespace kilin::quant {

BlockQ8_0 quantize_q8_0(const float* x);  // 32 elements
BlockQ4_0 quantize_q4_0(const float* x);  // 32 elements
BlockQ4_K quantize_q4_k(const float* x);  // 256 elements

// The float16 nearest to the scale of a block; an Error when it overflows.
uint16_t float16_scale(float scale);

}  // namespace kilin::quant
