// SPDX-License-Identifier: Apache-2.0
#pragma once
#include "kernels/conv/short_conv.h"
#include "kernels/cpu/dispatch.h"

// Channels [begin, end) of one sequence.
KILIN_DECLARE_ISA(void short_conv_slice(const ShortConvParams& p, int sequence, int64_t begin, int64_t end);)
