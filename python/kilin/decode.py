# SPDX-License-Identifier: Apache-2.0
"""One decode step of a KDA layer for many sequences: short convolution, gate, state update, output and gated RMSNorm. On
the GPU one kernel; on the CPU the operators of kilin.layer and kilin.kda_pool one after another, with the same result."""
import torch

from . import _library, _ops, layer

kda_decode_op = torch.ops.kilin.kda_decode.default


@torch.library.register_fake("kilin::kda_decode")
def _(*arguments):
    return None


@torch.library.impl("kilin::kda_decode", "CPU")
def _kda_decode_cpu(qkv, gate, beta, a_log, dt_bias, pool, conv_state, conv_weight, slots, z, norm_weight, out, scale,
                    gate_kind, lower_bound, l2norm, beta_is_logit, beta_scale, first_slot, eps, activation):
    value_heads, value_dim, key_dim = pool.shape[1:]
    if conv_weight.dim() == 3:  # [3, 4, channels]
        conv_weight = conv_weight.transpose(1, 2).flatten(0, 1)
    taps = conv_weight.shape[1]
    there = slots >= max(first_slot, 0)
    rows = slots.clamp_min(0).long()
    before = torch.where(there[:, None, None], conv_state[rows][:, :taps - 1], 0).float().contiguous()
    y, after = layer.short_conv_op(qkv.float()[:, None].contiguous(), conv_weight.float().contiguous(), before, None, True,
                                   True)
    conv_state[rows[there], :taps - 1] = after[there].to(conv_state.dtype)
    values = value_heads * value_dim
    keys = (y.shape[2] - values) // 2
    q, k, v = (x.unflatten(2, (-1, size)) for x, size in zip(y.split([keys, keys, values], 2), (key_dim, key_dim, value_dim)))
    o = _ops.kda_pool(q, k, v, gate[:, None], beta[:, None], pool, slots, a_log=a_log, dt_bias=dt_bias, scale=scale,
                      gate_kind=gate_kind, lower_bound=lower_bound, l2norm=l2norm, beta_is_logit=beta_is_logit,
                      beta_scale=beta_scale, form=_ops.RECURRENT, first_slot=first_slot)[:, 0]
    if norm_weight is not None:
        gate_of_norm = None if z is None else z.float().contiguous()
        o = layer.gated_rms_norm_op(o.contiguous(), gate_of_norm, norm_weight.float().contiguous(), eps, activation)
    out.copy_(o)


def kda_decode(qkv, gate, beta, pool, slots, *, conv_state, conv_weight, a_log=None, dt_bias=None, norm_weight=None, z=None,
               eps=1e-5, activation="sigmoid", scale=None, gate_kind=_ops.SOFTPLUS, lower_bound=-5.0, l2norm=True,
               beta_is_logit=True, beta_scale=1.0, first_slot=0, out=None):
    """One token of each of N sequences, states and convolution states updated in place. Returns out [N, HV, V].

    qkv [N, (2 H + HV) K]: the projections of q, k and v one after another, before the convolution. gate [N, HV, K] and
    beta [N, HV]: raw, as in kilin.kda. pool [slots, HV, V, K], float32 (on the GPU also bfloat16); conv_state [slots, 3
    or more, channels of qkv], the last three inputs, oldest first, in qkv's dtype; both at slots [N] (int32). A slot
    below first_slot (or 0) is padding: its outputs are zeros, its states are untouched. Two sequences must not share a slot.
    conv_weight [channels, 4] or [channels, 1, 4], or [3, 4, H K] float32 with q's, k's and v's taps as rows; SiLU follows.
    norm_weight [V]: out = norm_weight * o / sqrt(mean(o^2) + eps) * activation(z), z [N, HV, V]; without it out is o, and
    with activation None there is no z. On the GPU K = V of 64 or 128, bfloat16 or float16, and rows (of qkv, gate, beta, z,
    out) may be slices of wider ones. No gradient."""
    _library.require_device(qkv)
    if conv_weight.dim() == 3 and conv_weight.shape[1] == 1:
        conv_weight = conv_weight.squeeze(1)
    if norm_weight is None:
        if z is not None:
            raise ValueError("kilin: kda_decode has z, but no norm_weight")
        activation = None
    if activation not in layer.ACTIVATIONS or (norm_weight is not None and (activation is None) != (z is None)):
        raise ValueError(f"kilin: activation is {activation!r}, expected 'sigmoid' or 'silu' with z, None without")
    if pool.dim() != 4:
        raise ValueError(f"kilin: pool has the shape {tuple(pool.shape)}, expected [slots, HV, V, K]")
    tokens, (value_heads, value_dim, key_dim) = qkv.shape[0], pool.shape[1:]
    a_log, dt_bias = (x if x is None else x.to(torch.float32).reshape(-1).contiguous() for x in (a_log, dt_bias))
    if out is None:
        out = qkv.new_empty(tokens, value_heads, value_dim)
    kda_decode_op(qkv, gate, beta, a_log, dt_bias, pool, conv_state, conv_weight, slots.to(torch.int32).contiguous(), z,
                  norm_weight, out, key_dim ** -0.5 if scale is None else float(scale), gate_kind, float(lower_bound), l2norm,
                  beta_is_logit, float(beta_scale), first_slot, float(eps), layer.ACTIVATIONS[activation])
    return out
