# SPDX-License-Identifier: Apache-2.0
"""The operators of torch.ops.kilin: shapes for torch.compile, gradients, and kda(), which calls them.

Shapes: q, k [B, T, H, K]; v, out [B, T, HV, V]; gate [B, T, HV, K]; beta [B, T, HV]; a_log [HV];
dt_bias [HV * K]; states [N, HV, V, K]. HV is a multiple of H. With cu_seqlens [N + 1], B is 1 and sequence n
has the tokens cu_seqlens[n] to cu_seqlens[n + 1] - 1; without, N = B.
"""
import torch

from . import _library

SOFTPLUS, BOUNDED, NONE = 0, 1, 2  # gate kinds
# Forms. BY_LENGTH: on the CPU by the length of each sequence, on the GPU in chunks, for pools token by token.
BY_LENGTH, CHUNK, RECURRENT = 0, 1, 2
CHUNK_STATES_EVERY = 64  # tokens between the states that chunk_states asks for

kda_op = torch.ops.kilin.kda.default
kda_pool_op = torch.ops.kilin.kda_pool.default
kda_backward_op = torch.ops.kilin.kda_backward.default


def set_num_threads(count):
    """Threads of the CPU kernels; at import as many as torch has."""
    torch.ops.kilin.set_num_threads(count)


@torch.library.register_fake("kilin::kda")
def _(q, k, v, gate, beta, a_log, dt_bias, initial_state, cu_seqlens, scale, gate_kind, lower_bound, l2norm,
      beta_is_logit, beta_scale, form, want_state, chunk_states):
    sequences = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    state = (v.shape[2], v.shape[3], q.shape[3])
    return (q.new_empty(v.shape), q.new_empty((sequences, *state) if want_state else (0,), dtype=torch.float32),
            q.new_empty((chunk_states, *state)))


@torch.library.register_fake("kilin::kda_pool")
def _(q, k, v, *rest):
    return q.new_empty(v.shape)


@torch.library.register_fake("kilin::kda_backward")
def _(q, k, v, gate, beta, a_log, dt_bias, initial_state, *rest):
    def like(tensor):
        return q.new_empty(0) if tensor is None else tensor.new_empty(tensor.shape)

    return tuple(like(t) for t in (q, k, v, gate, beta, a_log, dt_bias, initial_state))


def padded(size):
    """The head dimension that the CUDA kernels compute with: 64 or 128."""
    if size > 128:
        raise NotImplementedError(f"kilin: the CUDA kernels have head dimensions up to 128, got {size}")
    return 64 if size <= 64 else 128


def recurrent_as_is(q, v):
    """Whether token by token on CUDA the plain recurrence runs, which takes these head dimensions as they are, and not
    the decode step, which needs K = V of 64 or 128."""
    return q.dtype == torch.float32 or max(q.shape[-1], v.shape[-1]) > 128 or padded(q.shape[-1]) != padded(v.shape[-1])


def pad(x, size):
    """x with zeros behind its last dimension up to size."""
    return x if x is None or x.shape[-1] == size else torch.nn.functional.pad(x, (0, size - x.shape[-1]))


def _setup_context(ctx, inputs, output):
    tensors, ctx.options = inputs[:9], inputs[9:15]
    ctx.save_for_backward(*tensors)
    ctx.want_state, ctx.chunk_states = inputs[16], inputs[17]


def _backward(ctx, d_out, d_state, d_chunk_states):
    tensors = ctx.saved_tensors
    # A gradient that nothing asked for arrives as zeros of the output's shape; chunk states have none.
    if ctx.chunk_states:
        raise NotImplementedError("kilin: the chunk states are for inference; they have no gradient")
    v = tensors[2]
    d_state = d_state.contiguous() if ctx.want_state and d_state is not None else None
    if d_out is None:
        d_out = torch.zeros_like(v)
    run = _backward_padded if v.is_cuda and tensors[0].shape[-1] != v.shape[-1] else kda_backward_op
    grads = run(*tensors, *ctx.options, d_out.contiguous(), d_state)
    grads = [None if t is None or not needed else g
             for g, t, needed in zip(grads, tensors[:8], ctx.needs_input_grad)]
    return (*grads, *([None] * 10))


def _backward_padded(q, k, v, gate, beta, a_log, dt_bias, initial_state, cu_seqlens, *rest):
    """kda_backward on CUDA where K is not V: both of the larger size, with zeros behind. Zeros in q and k leave their
    norms and all products as they are; channels added to v stay by themselves."""
    *options, d_out, d_state = rest
    key_dim, value_dim = q.shape[-1], v.shape[-1]
    size = max(padded(key_dim), padded(value_dim))

    def states(x):
        return None if x is None else torch.nn.functional.pad(x, (0, size - key_dim, 0, size - value_dim))

    if dt_bias is not None:
        dt_bias = pad(dt_bias.view(v.shape[2], key_dim), size).reshape(-1)
    dq, dk, dv, dgate, dbeta, da_log, ddt_bias, dstate = kda_backward_op(
        pad(q, size), pad(k, size), pad(v, size), pad(gate, size), beta, a_log, dt_bias, states(initial_state),
        cu_seqlens, *options, pad(d_out, size), states(d_state))
    if dt_bias is not None:
        ddt_bias = ddt_bias.view(v.shape[2], size)[:, :key_dim].reshape(-1)
    if initial_state is not None:
        dstate = dstate[..., :value_dim, :key_dim]
    return dq[..., :key_dim], dk[..., :key_dim], dv[..., :value_dim], dgate[..., :key_dim], dbeta, da_log, ddt_bias, dstate


torch.library.register_autograd("kilin::kda", _backward, setup_context=_setup_context)


def evenly_spaced(x):
    """x, copied only if its tokens [B, T, ...] are not evenly spaced rows, which is what the kernels read (on the GPU
    16 bytes at a time; beta, with three dimensions, is read by itself)."""
    if x.is_cuda and x.dim() == 4:
        if torch.compiler.is_compiling():  # where a tensor lies in its storage cannot be asked there
            return x.contiguous()
        if x.storage_offset() * x.element_size() % 16 or x.stride(1) * x.element_size() % 16:
            return x.clone(memory_format=torch.contiguous_format)
    row = 1
    for size, stride in zip(reversed(x.shape[2:]), reversed(x.stride()[2:])):
        if size != 1 and stride != row:
            return x.contiguous()
        row *= size
    batch, length = x.shape[:2]
    if batch * length <= 1:
        return x
    stride = x.stride(0) if length == 1 else x.stride(1)
    if stride < row or (batch > 1 and length > 1 and x.stride(0) != length * stride):
        return x.contiguous()
    return x


def prepare(q, k, v, gate, beta, a_log, dt_bias, gate_kind, beta_is_logit, beta_scale, float32=False):
    """The tensors as the operators take them: float32 on the CPU, unchanged on the GPU, tokens evenly spaced. float32:
    whether the GPU's kernel takes q in float32.
    Returns them with (beta_is_logit, beta_scale). Differentiable."""
    _library.require_device(q)
    if gate_kind == NONE:
        a_log = dt_bias = None
    if a_log is not None:
        a_log = a_log.to(torch.float32).reshape(-1).contiguous()
    if dt_bias is not None:
        dt_bias = dt_bias.to(torch.float32).reshape(-1).contiguous()
    for name, x in (("q", q), ("k", k), ("v", v), ("g", gate), ("beta", beta)):
        if not x.is_floating_point() or x.dtype == torch.float64:
            raise TypeError(f"kilin: {name} is {x.dtype}, expected float32, bfloat16 or float16 (sums are float32)")
    if not q.is_cuda:
        q, k, v, gate, beta = (x.to(torch.float32) for x in (q, k, v, gate, beta))
        if beta_scale != 1.0:
            beta = beta_scale * (torch.sigmoid(beta) if beta_is_logit else beta)
            beta_is_logit, beta_scale = False, 1.0
    elif q.dtype == torch.float32 and not float32:
        raise TypeError("kilin: q is float32, but the CUDA kernels take bfloat16 and float16 (fused_recurrent_kda, token "
                        "by token and without a gradient, takes float32 too)")
    elif gate.dtype not in (q.dtype, torch.float32):
        gate = gate.to(torch.float32)
    q, k, v, gate, beta = (evenly_spaced(x) for x in (q, k, v, gate, beta))
    return q, k, v, gate, beta, a_log, dt_bias, beta_is_logit, beta_scale


def kda(q, k, v, gate, beta, *, a_log=None, dt_bias=None, scale=None, initial_state=None, cu_seqlens=None,
        gate_kind=NONE, lower_bound=-5.0, l2norm=False, beta_is_logit=False, beta_scale=1.0, form=BY_LENGTH,
        want_state=True, chunk_states=0):
    """Kimi Delta Attention. Returns (out, final state [N, HV, V, K] float32 or an empty tensor, chunk states).

    gate_kind SOFTPLUS: g = -e^a_log softplus(gate + dt_bias); BOUNDED: g = lower_bound sigmoid(e^a_log (gate +
    dt_bias)); NONE: g = gate, the logarithm of the decay. l2norm: q and k are normalised first. beta_is_logit:
    beta = beta_scale sigmoid(beta), else beta_scale beta. chunk_states: number of 64-token chunks of all sequences together, to get the
    state before each. scale of q, 1 / sqrt(K) without it. out has q's dtype; on the CPU all sums are float32."""
    dtype = q.dtype
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    q, k, v, gate, beta, a_log, dt_bias, beta_is_logit, beta_scale = prepare(
        q, k, v, gate, beta, a_log, dt_bias, gate_kind, beta_is_logit, beta_scale, float32=form == RECURRENT)
    if initial_state is not None:
        initial_state = initial_state.to(torch.float32).contiguous()
    out, state, kept = kda_op(q, k, v, gate, beta, a_log, dt_bias, initial_state, cu_seqlens, scale, gate_kind,
                              float(lower_bound), l2norm, beta_is_logit, float(beta_scale), form, want_state,
                              chunk_states)
    return out.to(dtype), state, kept.to(dtype)


def kda_pool(q, k, v, gate, beta, pool, slots, *, accepted=None, a_log=None, dt_bias=None, scale=None,
             cu_seqlens=None, gate_kind=NONE, lower_bound=-5.0, l2norm=False, beta_is_logit=False, beta_scale=1.0,
             form=BY_LENGTH, first_slot=0):
    """kda() on a pool of states [slots, HV, V, K], read and updated in place: sequence n has slot slots[n]. A slot
    below first_slot is padding: its outputs are zeros, its state is untouched. Two sequences must not share a slot.
    pool: float32, on the GPU also bfloat16. No gradient.
    Speculation, on the GPU: slots [N, S] has a slot for the state after each token, and accepted [N] is the number of
    tokens of the last call that were accepted; sequence n starts from slot slots[n, accepted[n] - 1]."""
    if not q.is_cuda and (accepted is not None or slots.dim() != 1):
        raise NotImplementedError("kilin: a slot per token (speculation) is there for CUDA tensors only")
    if q.is_cuda and (q.shape[-1] != v.shape[-1] or q.shape[-1] not in (64, 128)):
        raise NotImplementedError("kilin: pools on CUDA have K = V of 64 or 128, got "
                                  f"{q.shape[-1]} and {v.shape[-1]}")
    dtype = q.dtype
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    q, k, v, gate, beta, a_log, dt_bias, beta_is_logit, beta_scale = prepare(
        q, k, v, gate, beta, a_log, dt_bias, gate_kind, beta_is_logit, beta_scale)
    if accepted is not None:
        accepted = accepted.to(torch.int32).contiguous()
    out = kda_pool_op(q, k, v, gate, beta, a_log, dt_bias, pool, slots.to(torch.int32).contiguous(), accepted,
                      cu_seqlens, scale, gate_kind, float(lower_bound), l2norm, beta_is_logit, float(beta_scale),
                      form, first_slot)
    return out.to(dtype)
