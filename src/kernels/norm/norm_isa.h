// SPDX-License-Identifier: Apache-2.0
#pragma once
#include "kernels/cpu/dispatch.h"
#include "kernels/norm/norm.h"

KILIN_DECLARE_ISA(void rms_norm_row(int64_t width, const float* x, const float* w, float eps, float* y);
                  void gate_row(int64_t width, const float* z, GateActivation activation, float* y);
                  void add_scaled_row(int64_t n, float scale, const float* y, float* x);
                  void swiglu_row(int64_t n, const float* gate, const float* up, float* out);
                  void silu_row(int64_t n, const float* x, float* y);
                  bool finite_row(int64_t n, const float* x);)
