// SPDX-License-Identifier: Apache-2.0
#pragma once
#include "kernels/conv/short_conv_backward.h"
#include "kernels/cpu/dispatch.h"

// Channels [begin, end) of all sequences.
KILIN_DECLARE_ISA(void short_conv_backward_slice(const ShortConvBackward& p, int64_t begin, int64_t end);)
