# SPDX-License-Identifier: Apache-2.0
"""flash-linear-attention's KDA functions on Kilin's kernels: same names, arguments and results.

    from kilin.fla import chunk_kda, fused_recurrent_kda      # instead of: from fla.ops.kda import ...

Every argument is honoured or refused with an error; unknown keywords are refused (FLA ignores them). What only
steers FLA's memory or speed is accepted and changes nothing: disable_recompute, cu_seqlens_cpu, chunk_size (32 or
64). Unlike FLA's, these functions can be traced by torch.compile, and fused_recurrent_kda has gradients.
"""
import warnings

import torch

from . import _ops

__all__ = ["chunk_kda", "fused_kda_gate", "fused_recurrent_kda", "fused_recurrent_kda_fwd"]


def _pop_transpose(kwargs, state_v_first):
    if "transpose_state_layout" in kwargs:
        if state_v_first:
            raise ValueError("Cannot pass both `state_v_first` and the deprecated `transpose_state_layout`.")
        warnings.warn("`transpose_state_layout` is deprecated and renamed to `state_v_first`.", DeprecationWarning,
                      stacklevel=3)
        return kwargs.pop("transpose_state_layout")
    return state_v_first


def _refuse_unknown(name, kwargs):
    if kwargs:
        raise TypeError(f"kilin: {name}() does not know the argument(s) {', '.join(sorted(kwargs))}")


def _check(q, k, v, g, beta, initial_state, cu_seqlens, state_v_first, allow_neg_eigval, use_beta_sigmoid_in_kernel):
    if cu_seqlens is not None:
        if q.shape[0] != 1:
            raise ValueError(f"The batch size is expected to be 1 rather than {q.shape[0]} when using `cu_seqlens`. "
                             "Please flatten variable-length inputs before processing.")
        if initial_state is not None and initial_state.shape[0] != len(cu_seqlens) - 1:
            raise ValueError("The number of initial states is expected to be equal to the number of input sequences, "
                             f"i.e., {len(cu_seqlens) - 1} rather than {initial_state.shape[0]}.")
    if allow_neg_eigval and not use_beta_sigmoid_in_kernel:
        raise ValueError("`allow_neg_eigval=True` requires `use_beta_sigmoid_in_kernel=True`.")
    (batch, length, heads, key_dim), (value_heads, value_dim) = q.shape, v.shape[2:]
    if k.shape != q.shape:
        raise ValueError(f"q and k must have the same shape, got q={tuple(q.shape)} vs k={tuple(k.shape)}")
    if key_dim > 256 or value_dim > 256:
        raise ValueError(f"kilin supports head dimensions up to 256, got {key_dim} and {value_dim}.")
    if value_heads % heads:
        raise ValueError(f"HV={value_heads} must be divisible by H={heads}.")
    if v.shape[:2] != q.shape[:2]:
        raise ValueError(f"v must have shape [B, T, HV, V] with [B, T] = {[batch, length]}, got {list(v.shape)}")
    if g.shape != (batch, length, value_heads, key_dim):
        raise ValueError(f"g must have shape {[batch, length, value_heads, key_dim]}, got {list(g.shape)}")
    if beta.shape != (batch, length, value_heads):
        raise ValueError(f"beta must have shape {[batch, length, value_heads]}, got {list(beta.shape)}")
    if initial_state is not None:
        sequences = batch if cu_seqlens is None else len(cu_seqlens) - 1
        state = (value_dim, key_dim) if state_v_first else (key_dim, value_dim)
        if initial_state.shape != (sequences, value_heads, *state):
            raise ValueError(f"initial_state must have shape {[sequences, value_heads, *state]}, "
                             f"got {list(initial_state.shape)}")


def _gate(use_gate_in_kernel, A_log, lower_bound):
    if not use_gate_in_kernel:
        return _ops.NONE
    if lower_bound is not None:
        return _ops.BOUNDED
    if A_log is None:
        raise ValueError("`A_log` must be provided when `use_gate_in_kernel=True` and `lower_bound` is not set.")
    return _ops.SOFTPLUS


def _run(q, k, v, g, beta, *, A_log, dt_bias, scale, initial_state, cu_seqlens, state_v_first, use_gate_in_kernel,
         lower_bound, use_qk_l2norm_in_kernel, use_beta_sigmoid_in_kernel, allow_neg_eigval, form, want_state,
         chunk_states=0):
    """(out, final state, chunk states) in FLA's layouts."""
    key_dim, value_dim = q.shape[-1], v.shape[-1]
    scale = key_dim ** -0.5 if scale is None else scale
    if initial_state is not None and not state_v_first:
        initial_state = initial_state.transpose(-1, -2)
    as_is = not q.is_cuda or (form == _ops.RECURRENT and _ops.recurrent_as_is(q, v))
    if not as_is and (_ops.padded(key_dim), _ops.padded(value_dim)) != (key_dim, value_dim):
        # Zeros in q and k leave their norms and all products as they are; channels added to v stay by themselves.
        keys, values = _ops.padded(key_dim), _ops.padded(value_dim)
        q, k, g, v = _ops.pad(q, keys), _ops.pad(k, keys), _ops.pad(g, keys), _ops.pad(v, values)
        if dt_bias is not None:
            dt_bias = _ops.pad(dt_bias.reshape(v.shape[2], key_dim), keys)
        if initial_state is not None:
            initial_state = torch.nn.functional.pad(
                initial_state, (0, keys - key_dim, 0, values - value_dim))
    out, state, kept = _ops.kda(
        q, k, v, g, beta, a_log=A_log, dt_bias=dt_bias, scale=scale, initial_state=initial_state,
        cu_seqlens=cu_seqlens, gate_kind=_gate(use_gate_in_kernel, A_log, lower_bound),
        lower_bound=-5.0 if lower_bound is None else lower_bound, l2norm=use_qk_l2norm_in_kernel,
        beta_is_logit=use_beta_sigmoid_in_kernel, beta_scale=2.0 if allow_neg_eigval else 1.0, form=form,
        want_state=want_state, chunk_states=chunk_states)
    if out.shape[-1] != value_dim:
        out = out[..., :value_dim]
    if not want_state:
        state = None
    else:
        state = _from_v_first(state, key_dim, value_dim, state_v_first)
    return out, state, _from_v_first(kept, key_dim, value_dim, state_v_first) if chunk_states else None


def _from_v_first(state, key_dim, value_dim, state_v_first):
    if state.shape[-2:] != (value_dim, key_dim):
        state = state[..., :value_dim, :key_dim]
    return state.contiguous() if state_v_first else state.transpose(-1, -2).contiguous()


def _count_chunks(q, cu_seqlens, cu_seqlens_cpu):
    size = _ops.CHUNK_STATES_EVERY
    if cu_seqlens is None:
        return q.shape[0] * (-(-q.shape[1] // size))
    offsets = (cu_seqlens if cu_seqlens_cpu is None else cu_seqlens_cpu).tolist()
    return sum(-(-(end - begin) // size) for begin, end in zip(offsets, offsets[1:]))


def chunk_kda(q, k, v, g, beta, scale=None, initial_state=None, output_final_state=False,
              use_qk_l2norm_in_kernel=False, use_gate_in_kernel=False, use_beta_sigmoid_in_kernel=False,
              allow_neg_eigval=False, safe_gate=False, lower_bound=None, disable_recompute=False,
              return_intermediate_states=False, state_v_first=False, cu_seqlens=None, cu_seqlens_cpu=None,
              cp_context=None, *, A_log=None, dt_bias=None, chunk_size=64, **kwargs):
    """FLA's chunk_kda. Returns (o [B, T, HV, V], final_state or None[, h]).

    q, k [B, T, H, K]; v [B, T, HV, V]; g [B, T, HV, K]; beta [B, T, HV]; states [N, HV, K, V], with state_v_first
    [N, HV, V, K], float32. h [B, chunks, HV, K, V] is the state before every 64 tokens, in q's dtype. Refused:
    cp_context; return_intermediate_states outside of torch.inference_mode or with chunk_size 32."""
    state_v_first = _pop_transpose(kwargs, state_v_first)
    _refuse_unknown("chunk_kda", kwargs)
    if cp_context is not None:
        raise NotImplementedError("kilin: chunk_kda does not do context parallelism (cp_context)")
    if chunk_size not in (32, 64):
        raise ValueError(f"`chunk_size` must be either 32 or 64 for KDA, got {chunk_size}.")
    if initial_state is not None and initial_state.dtype != torch.float32:
        raise ValueError(f"initial_state must be in float32, got {initial_state.dtype}.")
    if safe_gate and use_gate_in_kernel:
        if lower_bound is None:
            raise ValueError("`lower_bound` must be specified when `safe_gate=True` and `use_gate_in_kernel=True`.")
        if not -5 <= lower_bound < 0:
            raise ValueError(f"`lower_bound` must be in the safe range [-5, 0), got {lower_bound}.")
    _check(q, k, v, g, beta, initial_state, cu_seqlens, state_v_first, allow_neg_eigval, use_beta_sigmoid_in_kernel)
    chunk_states = 0
    if return_intermediate_states:
        if not torch.is_inference_mode_enabled():
            raise ValueError("return_intermediate_states is only allowed in inference mode")
        if disable_recompute:
            raise ValueError("return_intermediate_states must be used with disable_recompute=False")
        if chunk_size != _ops.CHUNK_STATES_EVERY:
            raise NotImplementedError("kilin: return_intermediate_states has chunks of 64 tokens only")
        chunk_states = _count_chunks(q, cu_seqlens, cu_seqlens_cpu)
    o, state, h = _run(
        q, k, v, g, beta, A_log=A_log, dt_bias=dt_bias, scale=scale, initial_state=initial_state,
        cu_seqlens=cu_seqlens, state_v_first=state_v_first, use_gate_in_kernel=use_gate_in_kernel,
        lower_bound=lower_bound, use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel,
        use_beta_sigmoid_in_kernel=use_beta_sigmoid_in_kernel, allow_neg_eigval=allow_neg_eigval,
        form=_ops.BY_LENGTH, want_state=output_final_state, chunk_states=chunk_states)
    if not return_intermediate_states:
        return o, state
    if h is None:  # no token, no chunk
        h = q.new_empty(0, v.shape[2], *((v.shape[3], q.shape[3]) if state_v_first else (q.shape[3], v.shape[3])))
    return o, state, h.unflatten(0, (q.shape[0], -1)) if q.shape[0] > 1 else h.unsqueeze(0)


def fused_recurrent_kda(q, k, v, g, beta, A_log=None, dt_bias=None, scale=None, initial_state=None,
                        output_final_state=False, use_qk_l2norm_in_kernel=False, use_gate_in_kernel=False,
                        use_beta_sigmoid_in_kernel=False, allow_neg_eigval=False, lower_bound=None,
                        state_v_first=False, cu_seqlens=None, **kwargs):
    """FLA's fused_recurrent_kda, token by token. Shapes as chunk_kda; on the GPU also float32 and head dimensions up to
    256, then without a gradient. The state of an empty sequence is its initial state (FLA leaves it
    undefined)."""
    state_v_first = _pop_transpose(kwargs, state_v_first)
    _refuse_unknown("fused_recurrent_kda", kwargs)
    _check(q, k, v, g, beta, initial_state, cu_seqlens, state_v_first, allow_neg_eigval, use_beta_sigmoid_in_kernel)
    return _run(
        q, k, v, g, beta, A_log=A_log, dt_bias=dt_bias, scale=scale, initial_state=initial_state,
        cu_seqlens=cu_seqlens, state_v_first=state_v_first, use_gate_in_kernel=use_gate_in_kernel,
        lower_bound=lower_bound, use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel,
        use_beta_sigmoid_in_kernel=use_beta_sigmoid_in_kernel, allow_neg_eigval=allow_neg_eigval,
        form=_ops.RECURRENT, want_state=output_final_state)[:2]


def fused_recurrent_kda_fwd(q, k, v, g, beta, A_log=None, dt_bias=None, initial_state=None, scale=None,
                            output_final_state=False, inplace_final_state=True, state_v_first=False, cu_seqlens=None,
                            ssm_state_indices=None, num_accepted_tokens=None, use_qk_l2norm_in_kernel=False,
                            use_gate_in_kernel=False, use_beta_sigmoid_in_kernel=False, allow_neg_eigval=False,
                            lower_bound=None, out=None, **kwargs):
    """FLA's inner function. With ssm_state_indices [N] (on the GPU also [N, S], a slot for the state after each token,
    with num_accepted_tokens [N]), initial_state is a pool of states that is read and updated in place; a pool in the
    layout K x V is gathered, turned and scattered again, so prefer state_v_first. Refused: a pool without
    inplace_final_state."""
    _refuse_unknown("fused_recurrent_kda_fwd", kwargs)
    options = dict(A_log=A_log, dt_bias=dt_bias, scale=scale, cu_seqlens=cu_seqlens,
                   use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel, use_gate_in_kernel=use_gate_in_kernel,
                   use_beta_sigmoid_in_kernel=use_beta_sigmoid_in_kernel, allow_neg_eigval=allow_neg_eigval,
                   lower_bound=lower_bound)
    if inplace_final_state and initial_state is None:
        raise ValueError("inplace_final_state needs an initial_state")
    if ssm_state_indices is None:
        if num_accepted_tokens is not None:
            raise ValueError("num_accepted_tokens needs ssm_state_indices")
        o, state = fused_recurrent_kda(q, k, v, g, beta, initial_state=initial_state,
                                       output_final_state=output_final_state or inplace_final_state,
                                       state_v_first=state_v_first, **options)
        if inplace_final_state:
            state = initial_state.copy_(state)
    elif not inplace_final_state:
        raise NotImplementedError("kilin: fused_recurrent_kda_fwd updates a pool (ssm_state_indices) in place only")
    elif not state_v_first:
        if ssm_state_indices.dim() != 1 or num_accepted_tokens is not None:
            raise NotImplementedError("kilin: num_accepted_tokens and a slot per token need state_v_first=True")
        slots = ssm_state_indices.long()
        o, new = fused_recurrent_kda(q, k, v, g, beta, initial_state=initial_state[slots].float(),
                                     output_final_state=True, **options)
        initial_state[slots] = new.to(initial_state.dtype)
        state = initial_state
    else:
        _check(q, k, v, g, beta, None, cu_seqlens, True, allow_neg_eigval, use_beta_sigmoid_in_kernel)
        o = _ops.kda_pool(
            q, k, v, g, beta, initial_state, ssm_state_indices, accepted=num_accepted_tokens, a_log=A_log,
            dt_bias=dt_bias, scale=scale, cu_seqlens=cu_seqlens,
            gate_kind=_gate(use_gate_in_kernel, A_log, lower_bound),
            lower_bound=-5.0 if lower_bound is None else lower_bound, l2norm=use_qk_l2norm_in_kernel,
            beta_is_logit=use_beta_sigmoid_in_kernel, beta_scale=2.0 if allow_neg_eigval else 1.0,
            form=_ops.RECURRENT)
        state = initial_state
    return (o if out is None else out.copy_(o)), state


def fused_kda_gate(g, A_log=None, dt_bias=None, lower_bound=None, output_dtype=torch.float32):
    """The gate by itself, [..., HV, K]: -e^A_log softplus(g + dt_bias), with lower_bound lower_bound
    sigmoid(e^A_log (g + dt_bias)), where A_log may be missing. Plain torch operations, so gradients are torch's."""
    value_heads = g.shape[-2]
    if A_log is None and lower_bound is None:
        raise ValueError("`A_log` must be provided when `lower_bound` is not set.")
    x = g.float()
    if dt_bias is not None:
        x = x + dt_bias.float().reshape(value_heads, -1)
    rate = None if A_log is None else A_log.float().reshape(value_heads, 1).exp()
    if lower_bound is None:
        return (-rate * torch.nn.functional.softplus(x)).to(output_dtype)
    return (lower_bound * torch.sigmoid(x if rate is None else rate * x)).to(output_dtype)
