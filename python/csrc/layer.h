// SPDX-License-Identifier: Apache-2.0
// Shapes of the operators around KDA. Short convolution: u [B, T, C], weight [C, taps], states [N, taps - 1,
// C] (oldest first), cu_seqlens as for kda. Gated norm: x, z [tokens, heads, width], weight [width].
#pragma once
#include "arguments.h"
#include "kernels/norm/norm.h"

namespace kilin::torch_ops {

struct ConvShape {
  int64_t batch, length, channels, taps, sequences;
  int64_t tokens() const { return batch * length; }
};

inline ConvShape conv_shape(const Tensor& u, const Tensor& weight, const OptionalTensor& state,
                            const OptionalTensor& cu_seqlens) {
  check(u.dim() == 3, "short_conv: u has {} dimensions, expected [B, T, C]", u.dim());
  check(weight.dim() == 2 && weight.size(0) == u.size(2) && weight.is_contiguous(),
        "short_conv: weight must be contiguous [{}, taps]", u.size(2));
  check_same_device("weight", weight, u);
  ConvShape s{u.size(0), u.size(1), u.size(2), weight.size(1), u.size(0)};
  check(s.taps >= 2 && s.taps <= 4, "short_conv: {} taps, expected 2 to 4", s.taps);
  if (cu_seqlens) {
    check(s.batch == 1, "short_conv: the batch size is {}, expected 1 with cu_seqlens", s.batch);
    check_bounds(*cu_seqlens, u);
    s.sequences = cu_seqlens->numel() - 1;
  }
  if (state) {
    check(state->dim() == 3 && state->size(0) == s.sequences && state->size(1) == s.taps - 1 &&
              state->size(2) == s.channels,
          "short_conv: the state must be [{}, {}, {}]", s.sequences, s.taps - 1, s.channels);
    check_plain("state", *state, s.sequences * (s.taps - 1) * s.channels, u.scalar_type(), u);
  }
  check(s.tokens() <= INT32_MAX && s.sequences <= INT32_MAX, "short_conv: {} tokens are too many",
        s.tokens());
  return s;
}

struct NormShape {
  int64_t tokens, heads, width;
  GateActivation activation;
};

// activation: 0 none (z is not given), 1 sigmoid, 2 silu.
inline NormShape norm_shape(const Tensor& x, const OptionalTensor& z, const OptionalTensor& weight,
                            int64_t activation) {
  check(x.dim() == 3, "gated_rms_norm: x has {} dimensions, expected [tokens, heads, width]", x.dim());
  check(activation >= 0 && activation <= 2, "gated_rms_norm: activation is {}, expected 0 to 2", activation);
  check(z.has_value() == (activation != 0),
        "gated_rms_norm: z is given without an activation, or not with one");
  if (z) {
    check_sizes("z", *z, {x.size(0), x.size(1), x.size(2)});
    check_same_device("z", *z, x);
  }
  if (weight) check_plain("weight", *weight, x.size(2), weight->scalar_type(), x);
  constexpr std::array kKinds = {GateActivation::kNone, GateActivation::kSigmoid, GateActivation::kSilu};
  return {x.size(0), x.size(1), x.size(2), kKinds[static_cast<size_t>(activation)]};
}

}  // namespace kilin::torch_ops
