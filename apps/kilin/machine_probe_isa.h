// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <cstdint>

#include "kernels/cpu/dispatch.h"

// Sum of `count` floats: reads memory as fast as one thread can.
KILIN_DECLARE_ISA(float probe_sum(const float* data, int64_t count);)
// `rounds` times as many multiply-adds as registers can hold in flight; returns a value that depends on all.
KILIN_DECLARE_ISA(float probe_multiply_add(int64_t rounds);)
// Floating point operations of one round.
KILIN_DECLARE_ISA(int64_t probe_flops_per_round();)
