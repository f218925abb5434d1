# SPDX-License-Identifier: Apache-2.0
"""The functions that vLLM's KDA layers call, on Kilin's kernels (vLLM's Kimi K3 layer, 2026-08 to 2026-11).

Packed batches [1, T, H, D]; raw gate and raw beta (the activation happens inside); states V x K, a pool
[slots, H, V, K] indexed by state_indices, where a slot <= 0 is vLLM's null block: its output is zeros and it is
not written. What is not there raises NotImplementedError with its name: speculation on CPU tensors and
kda_recoverssm_verify.
"""
from . import _ops
from .decode import kda_decode

__all__ = ["chunk_kda_with_fused_gate", "flash_kda_fwd", "fused_kda_decode", "fused_recurrent_kda",
           "fused_recurrent_kda_packed_decode", "kda_recoverssm_verify"]


def _gate(lower_bound):
    if lower_bound is None:
        return dict(gate_kind=_ops.SOFTPLUS)
    return dict(gate_kind=_ops.BOUNDED, lower_bound=lower_bound)


def _refuse_unknown(name, kwargs):
    if kwargs:
        raise TypeError(f"kilin: {name}() does not know the argument(s) {', '.join(sorted(kwargs))}")


def chunk_kda_with_fused_gate(q, k, v, raw_g, raw_beta, A_log, g_bias, scale=None, initial_state=None,
                              output_final_state=False, lower_bound=None, use_qk_l2norm_in_kernel=False,
                              cu_seqlens=None, **kwargs):
    """Prefill. initial_state [N, H, V, K]; returns (o [1, T, H, V], final state [N, H, V, K] float32 or None)."""
    _refuse_unknown("chunk_kda_with_fused_gate", kwargs)
    o, state, _ = _ops.kda(q, k, v, raw_g, raw_beta, a_log=A_log, dt_bias=g_bias, scale=scale,
                           initial_state=initial_state, cu_seqlens=cu_seqlens, l2norm=use_qk_l2norm_in_kernel,
                           beta_is_logit=True, want_state=output_final_state, **_gate(lower_bound))
    return o, state if output_final_state else None


def flash_kda_fwd(q, k, v, g, beta, scale, out, A_log, dt_bias, lower_bound, initial_state=None, final_state=None,
                  cu_seqlens=None):
    """FlashKDA's fwd (bounded gate, l2norm, sigmoid of beta): writes out and final_state [N, H, V, K]."""
    o, state, _ = _ops.kda(q, k, v, g, beta, a_log=A_log, dt_bias=dt_bias, scale=scale, initial_state=initial_state,
                           cu_seqlens=cu_seqlens, l2norm=True, beta_is_logit=True,
                           want_state=final_state is not None, **_gate(lower_bound))
    out.copy_(o)
    if final_state is not None:
        final_state.copy_(state)


def _pool_step(q, k, v, raw_g, raw_beta, A_log, dt_bias, lower_bound, scale, pool, slots, cu_seqlens, accepted=None):
    return _ops.kda_pool(q, k, v, raw_g, raw_beta, pool, slots, accepted=accepted, a_log=A_log, dt_bias=dt_bias,
                         scale=scale, cu_seqlens=cu_seqlens, l2norm=True, beta_is_logit=True, form=_ops.RECURRENT,
                         first_slot=1, **_gate(lower_bound))


def fused_recurrent_kda(q, k, v, raw_g, raw_beta, A_log, dt_bias, lower_bound, initial_state, cu_seqlens,
                        ssm_state_indices, num_accepted_tokens=None, out=None, fuse_gate=None):
    """Decode on the pool initial_state, in place. Returns (out [1, T, H, V], pool). Speculation (GPU only):
    ssm_state_indices [N, S] with a slot for the state after each token, and num_accepted_tokens [N]. fuse_gate only
    steers vLLM's own kernel."""
    o = _pool_step(q, k, v, raw_g, raw_beta, A_log, dt_bias, lower_bound, None, initial_state, ssm_state_indices,
                   cu_seqlens, num_accepted_tokens)
    return (o if out is None else out.copy_(o)), initial_state


def fused_recurrent_kda_packed_decode(mixed_qkv, raw_g, raw_beta, A_log, dt_bias, lower_bound, initial_state,
                                      state_indices, scale=None):
    """One token for each of T sequences. mixed_qkv [T, 2 H K + H V (or more)] holds q, k and v one after another;
    raw_g [1, T, H, K], raw_beta [1, T, H]. Returns (out [1, T, H, V], pool)."""
    heads, value_dim, key_dim = initial_state.shape[1:]
    sizes = (heads * key_dim, heads * key_dim, heads * value_dim)
    if mixed_qkv.shape[1] < sum(sizes):
        raise ValueError(f"mixed_qkv has {mixed_qkv.shape[1]} channels, expected at least {sum(sizes)}")
    q, k, v = (x.unflatten(1, (heads, -1)).unsqueeze(0)
               for x in mixed_qkv[:, :sum(sizes)].split(sizes, dim=1))
    # [T, 1, H, D]: T sequences of one token
    out = _pool_step(*(x.transpose(0, 1) for x in (q, k, v, raw_g, raw_beta)), A_log, dt_bias, lower_bound, scale,
                     initial_state, state_indices, None)
    return out.transpose(0, 1), initial_state


def fused_kda_decode(x, weight, bias, conv_state, raw_g, raw_beta, A_log, dt_bias, state_indices, state, out=None,
                     lower_bound=None, output_gate=None, norm_weight=None, norm_eps=1e-5):
    """One token for each of N sequences, convolution and gated norm included. x [N, 3 H K]: q, k and v before the
    convolution; weight [3, 4, H K] float32, bias None; conv_state [slots, 3 H K, 3], a transposed view of [slots, 3, 3 H
    K] (vLLM's layout "SD"); raw_g [1, N, H, K], raw_beta [1, N, H]; state [slots, H, V, K]; output_gate [N, H, V] and
    norm_weight [V], or neither. Writes out [1, N, H, V] and returns it."""
    if bias is not None:
        raise NotImplementedError("kilin: fused_kda_decode with a bias of the convolution is not there")
    if conv_state.stride(1) != 1:
        raise NotImplementedError("kilin: fused_kda_decode takes the convolution's states with their channels next to each "
                                  "other (vLLM's layout SD), not DS")
    if (output_gate is None) != (norm_weight is None):
        raise ValueError("kilin: fused_kda_decode needs output_gate and norm_weight, or neither")
    o = kda_decode(x, raw_g.squeeze(0), raw_beta.squeeze(0), state, state_indices, conv_state=conv_state.transpose(1, 2),
                   conv_weight=weight, a_log=A_log, dt_bias=dt_bias, norm_weight=norm_weight, z=output_gate, eps=norm_eps,
                   first_slot=1, out=None if out is None else out.squeeze(0), **_gate(lower_bound))
    return o.unsqueeze(0) if out is None else out


def kda_recoverssm_verify(*args, **kwargs):
    """Verification of drafted tokens with RecoverSSM: not there."""
    raise NotImplementedError("kilin: kda_recoverssm_verify is not there (speculative decoding)")
