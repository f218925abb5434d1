// SPDX-License-Identifier: Apache-2.0
#include "kernels/norm/norm_isa.h"

#include "kernels/cpu/vec.h"

namespace kilin::KILIN_ISA {
namespace {

// apply(vector index base, lanes used) over [0, n)
template <class Full, class Part>
KILIN_INLINE void for_vectors(int64_t n, const Full& full, const Part& part) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) full(i);
  if (i < n) part(i, static_cast<int>(n - i));
}

KILIN_INLINE float sqrt_scalar(float x) { return __builtin_sqrtf(x); }

}  // namespace

void rms_norm_row(int64_t width, const float* x, const float* w, float eps, float* y) {
  Vec sum = zero();
  for_vectors(
      width, [&](int64_t i) { sum += load(x + i) * load(x + i); },
      [&](int64_t i, int n) {
        const Vec v = load_part(x + i, n);
        sum += v * v;
      });
  const Vec scale = splat(1.0f / sqrt_scalar(reduce_add(sum) / static_cast<float>(width) + eps));
  for_vectors(
      width, [&](int64_t i) { store(y + i, load(w + i) * (load(x + i) * scale)); },
      [&](int64_t i, int n) { store_part(y + i, load_part(w + i, n) * (load_part(x + i, n) * scale), n); });
}

void gate_row(int64_t width, const float* z, GateActivation activation, float* y) {
  const bool silu_gate = activation == GateActivation::kSilu;
  for_vectors(
      width,
      [&](int64_t i) {
        const Vec v = load(z + i);
        store(y + i, load(y + i) * (silu_gate ? silu(v) : sigmoid(v)));
      },
      [&](int64_t i, int n) {
        const Vec v = load_part(z + i, n);
        store_part(y + i, load_part(y + i, n) * (silu_gate ? silu(v) : sigmoid(v)), n);
      });
}

void add_scaled_row(int64_t n, float scale, const float* y, float* x) {
  const Vec s = splat(scale);
  for_vectors(
      n, [&](int64_t i) { store(x + i, load(x + i) + s * load(y + i)); },
      [&](int64_t i, int part) {
        store_part(x + i, load_part(x + i, part) + s * load_part(y + i, part), part);
      });
}

void swiglu_row(int64_t n, const float* gate, const float* up, float* out) {
  for_vectors(
      n, [&](int64_t i) { store(out + i, silu(load(gate + i)) * load(up + i)); },
      [&](int64_t i, int part) {
        store_part(out + i, silu(load_part(gate + i, part)) * load_part(up + i, part), part);
      });
}

void silu_row(int64_t n, const float* x, float* y) {
  for_vectors(
      n, [&](int64_t i) { store(y + i, silu(load(x + i))); },
      [&](int64_t i, int part) { store_part(y + i, silu(load_part(x + i, part)), part); });
}

bool finite_row(int64_t n, const float* x) {
  Vec sum = zero();  // x * 0 is 0 for finite x and NaN otherwise
  for_vectors(
      n, [&](int64_t i) { sum += load(x + i) * zero(); },
      [&](int64_t i, int part) { sum += load_part(x + i, part) * zero(); });
  return reduce_add(sum) == 0.0f;
}

}  // namespace kilin::KILIN_ISA
