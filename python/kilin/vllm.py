# SPDX-License-Identifier: Apache-2.0
"""The functions that vLLM's KDA layers call, on Kilin's kernels (vLLM's Kimi K3 layer, 2026-08 to 2026-11).

Packed batches [1, T, H, D]; raw gate and raw beta (the activation happens inside); states V x K, a pool
[slots, H, V, K] indexed by state_indices, where a slot <= 0 is vLLM's null block: its output is zeros and it is
not written. What Kilin has no kernel for raises NotImplementedError with its name: speculative decoding
(num_accepted_tokens, kda_recoverssm_verify) and the decode step fused with convolution and output norm
(fused_kda_decode).
"""
import torch

from . import _ops

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


def _pool_step(q, k, v, raw_g, raw_beta, A_log, dt_bias, lower_bound, scale, pool, slots, cu_seqlens):
    """[1, T, H, V], zeros for sequences whose slot is <= 0; T is the number of sequences or cu_seqlens is given."""
    used = slots > 0
    out = _ops.kda_pool(q, k, v, raw_g, raw_beta, pool, torch.where(used, slots, -1), a_log=A_log, dt_bias=dt_bias,
                        scale=scale, cu_seqlens=cu_seqlens, l2norm=True, beta_is_logit=True, form=_ops.RECURRENT,
                        **_gate(lower_bound))
    if q.shape[1] != slots.shape[0]:
        # which sequence each token belongs to, without looking at the numbers on the host
        token = torch.arange(q.shape[1], device=q.device)
        used = used[torch.searchsorted(cu_seqlens[1:].contiguous(), token.to(cu_seqlens.dtype), right=True)]
    return out.masked_fill_(~used[None, :, None, None], 0.0)


def fused_recurrent_kda(q, k, v, raw_g, raw_beta, A_log, dt_bias, lower_bound, initial_state, cu_seqlens,
                        ssm_state_indices, num_accepted_tokens=None, out=None, fuse_gate=None):
    """Decode on the pool initial_state, in place. Returns (out [1, T, H, V], pool). fuse_gate only steers vLLM's own
    kernel. A slot per token (two-dimensional ssm_state_indices) is for speculation, which is not there."""
    if num_accepted_tokens is not None or ssm_state_indices.dim() != 1:
        raise NotImplementedError("kilin: fused_recurrent_kda does not do speculative decoding (num_accepted_tokens)")
    o = _pool_step(q, k, v, raw_g, raw_beta, A_log, dt_bias, lower_bound, None, initial_state, ssm_state_indices,
                   cu_seqlens)
    return (o if out is None else out.copy_(o)), initial_state


def fused_recurrent_kda_packed_decode(mixed_qkv, raw_g, raw_beta, A_log, dt_bias, lower_bound, initial_state,
                                      state_indices, scale=None):
    """One token for each of T sequences. mixed_qkv [T, 2 H K + H V (or more)] holds q, k and v one after another;
    raw_g [1, T, H, K], raw_beta [1, T, H]. Returns (out [1, T, H, V], pool)."""
    tokens = mixed_qkv.shape[0]
    heads, value_dim, key_dim = initial_state.shape[1:]
    sizes = (heads * key_dim, heads * key_dim, heads * value_dim)
    if mixed_qkv.shape[1] < sum(sizes):
        raise ValueError(f"mixed_qkv has {mixed_qkv.shape[1]} channels, expected at least {sum(sizes)}")
    q, k, v = (x.unflatten(1, (heads, -1)).unsqueeze(0)
               for x in mixed_qkv[:, :sum(sizes)].split(sizes, dim=1))
    offsets = torch.arange(tokens + 1, dtype=torch.int32, device=mixed_qkv.device)
    out = _pool_step(q, k, v, raw_g, raw_beta, A_log, dt_bias, lower_bound, scale, initial_state, state_indices,
                     offsets)
    return out, initial_state


def fused_kda_decode(*args, **kwargs):
    """Convolution, KDA step and gated output norm in one: not there."""
    raise NotImplementedError("kilin: fused_kda_decode is not there (the KDA step fused with convolution and norm)")


def kda_recoverssm_verify(*args, **kwargs):
    """Verification of drafted tokens with RecoverSSM: not there."""
    raise NotImplementedError("kilin: kda_recoverssm_verify is not there (speculative decoding)")
