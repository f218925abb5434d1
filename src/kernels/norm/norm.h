// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <cstdint>

#include "base/thread_pool.h"

namespace kilin {

// y[t][i] = w[i] * x[t][i] / sqrt(mean_i x[t][i]^2 + eps); x and y are [tokens][stride], width values used. y
// may be x.
void rms_norm(int64_t tokens, int64_t width, const float* x, int64_t x_stride, const float* w, float eps,
              float* y, int64_t y_stride, ThreadPool& pool);

enum class GateActivation { kNone, kSigmoid, kSilu };

// The output norm of a KDA layer: per token and head of `width` values
// y = (w * x / sqrt(mean x^2 + eps)) * act(z); x, z, y are [tokens][heads * width] without gaps; z null for
// kNone.
void gated_rms_norm(int64_t tokens, int64_t heads, int64_t width, const float* x, const float* w, float eps,
                    const float* z, GateActivation activation, float* y, ThreadPool& pool);

// x += y, n values
void add_in_place(int64_t n, float* x, const float* y, ThreadPool& pool);
// x += scale * y
void add_scaled(int64_t n, float scale, const float* y, float* x);

// out = silu(gate) * up, n values; out may be gate
void swiglu(int64_t n, const float* gate, const float* up, float* out, ThreadPool& pool);

// y = silu(x), n values; y may be x
void silu(int64_t n, const float* x, float* y, ThreadPool& pool);

// Whether none of n values is NaN or infinite.
bool all_finite(int64_t n, const float* x);

}  // namespace kilin
