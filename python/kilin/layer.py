# SPDX-License-Identifier: Apache-2.0
"""What stands around KDA in its layer: the short causal convolution in front of q, k and v, and the gated RMSNorm behind
the output. Both with gradients; sums are float32.

On CUDA: bfloat16 and float16; short_conv with a number of channels that is a multiple of 8, gated_rms_norm with a last
dimension of 64, 128 or 256. On the CPU: float32, bfloat16 and float16."""
import torch

from . import _library
from ._ops import evenly_spaced

ACTIVATIONS = {None: 0, "sigmoid": 1, "silu": 2, "swish": 2}

short_conv_op = torch.ops.kilin.short_conv.default
short_conv_backward_op = torch.ops.kilin.short_conv_backward.default
short_conv_update_op = torch.ops.kilin.short_conv_update.default
gated_rms_norm_op = torch.ops.kilin.gated_rms_norm.default
gated_rms_norm_backward_op = torch.ops.kilin.gated_rms_norm_backward.default


@torch.library.register_fake("kilin::short_conv")
def _(u, weight, initial_state, cu_seqlens, silu, want_state):
    sequences = u.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return u.new_empty(u.shape), u.new_empty((sequences, weight.shape[1] - 1, u.shape[2]) if want_state else (0,))


@torch.library.register_fake("kilin::short_conv_backward")
def _(u, weight, initial_state, cu_seqlens, silu, d_y, d_state):
    return (u.new_empty(u.shape), u.new_empty(weight.shape, dtype=torch.float32),
            u.new_empty(0 if initial_state is None else initial_state.shape))


@torch.library.register_fake("kilin::short_conv_update")
def _(u, weight, pool, slots, silu):
    return u.new_empty(u.shape)


@torch.library.register_fake("kilin::gated_rms_norm")
def _(x, z, weight, eps, activation):
    return x.new_empty(x.shape)


@torch.library.register_fake("kilin::gated_rms_norm_backward")
def _(x, z, weight, eps, activation, d_y):
    return (x.new_empty(x.shape), x.new_empty(0 if z is None else z.shape),
            x.new_empty(0 if weight is None else weight.shape, dtype=torch.float32))


@torch.library.impl("kilin::short_conv_backward", "CPU")
def _short_conv_backward_cpu(u, weight, initial_state, cu_seqlens, silu, d_y, d_state):
    batch, length, channels = u.shape
    taps = weight.shape[1]
    if cu_seqlens is None:
        pieces = [(b, 0, length) for b in range(batch)]
    else:
        bounds = cu_seqlens.tolist()
        pieces = [(0, begin, end) for begin, end in zip(bounds, bounds[1:])]
    du, d_weight = torch.zeros_like(u), torch.zeros_like(weight)
    d_initial = u.new_empty(0) if initial_state is None else torch.zeros_like(initial_state)
    for n, (b, begin, end) in enumerate(pieces):
        before = u.new_zeros(taps - 1, channels) if initial_state is None else initial_state[n]
        inputs = torch.cat([before, u[b, begin:end]])
        windows = torch.stack([inputs[i:i + end - begin] for i in range(taps)], -1)  # [tokens, channels, taps]
        z = (windows * weight).sum(-1)
        dz = d_y[b, begin:end]
        if silu:
            s = torch.sigmoid(z)
            dz = dz * s * (1 + z * (1 - s))
        d_weight += (dz[..., None] * windows).sum(0)
        d_inputs = torch.zeros_like(inputs)
        for i in range(taps):
            d_inputs[i:i + end - begin] += dz * weight[:, i]
        if d_state is not None:
            d_inputs[end - begin:] += d_state[n]
        du[b, begin:end] = d_inputs[taps - 1:]
        if initial_state is not None:
            d_initial[n] = d_inputs[:taps - 1]
    return du, d_weight, d_initial


@torch.library.impl("kilin::short_conv_update", "CPU")
def _short_conv_update_cpu(u, weight, pool, slots, silu):
    there = slots >= 0
    rows = slots.clamp_min(0).long()
    before = torch.where(there[:, None, None], pool[rows], 0.0)
    y, after = short_conv_op(u[:, None], weight, before.contiguous(), None, silu, True)
    pool[rows[there]] = after[there]
    return y[:, 0].clone()


@torch.library.impl("kilin::gated_rms_norm_backward", "CPU")
def _gated_rms_norm_backward_cpu(x, z, weight, eps, activation, d_y):
    r = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    normal = x * r
    gate = slope = None
    if activation:
        s = torch.sigmoid(z)
        gate, slope = (s, s * (1 - s)) if activation == 1 else (z * s, s * (1 + z * (1 - s)))
    gated = d_y if gate is None else d_y * gate
    d_weight = x.new_empty(0) if weight is None else (gated * normal).sum((0, 1))
    h = gated if weight is None else gated * weight
    dx = r * (h - normal * (h * normal).mean(-1, keepdim=True))
    dz = x.new_empty(0) if gate is None else d_y * slope * (normal if weight is None else normal * weight)
    return dx, dz, d_weight


def _conv_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:4])
    ctx.silu, ctx.want_state = inputs[4:]


def _conv_backward(ctx, d_y, d_state):
    u, weight, initial_state, cu_seqlens = ctx.saved_tensors
    d_state = d_state.contiguous() if ctx.want_state and d_state is not None else None
    d_y = torch.zeros_like(u) if d_y is None else d_y.contiguous()
    du, d_weight, d_initial = short_conv_backward_op(u, weight, initial_state, cu_seqlens, ctx.silu, d_y, d_state)
    needed = ctx.needs_input_grad
    return (du if needed[0] else None, d_weight.to(weight.dtype) if needed[1] else None,
            d_initial if initial_state is not None and needed[2] else None, None, None, None)


def _norm_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:3])
    ctx.eps, ctx.activation = inputs[3:]


def _norm_backward(ctx, d_y):
    x, z, weight = ctx.saved_tensors
    dx, dz, d_weight = gated_rms_norm_backward_op(x, z, weight, ctx.eps, ctx.activation, d_y.contiguous())
    needed = ctx.needs_input_grad
    return (dx if needed[0] else None, dz if z is not None and needed[1] else None,
            d_weight.to(weight.dtype) if weight is not None and needed[2] else None, None, None)


torch.library.register_autograd("kilin::short_conv", _conv_backward, setup_context=_conv_context)
torch.library.register_autograd("kilin::gated_rms_norm", _norm_backward, setup_context=_norm_context)


def _checked(name, x):
    _library.require_device(x)
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16) or (x.is_cuda and x.dtype == torch.float32):
        raise TypeError(f"kilin: {name} is {x.dtype}, expected bfloat16 or float16, on the CPU also float32")
    return x if x.is_cuda else x.to(torch.float32)


def _weight(weight, x):
    """As the operators take it: float32 on the CPU."""
    return weight if weight is None else (weight if x.is_cuda else weight.to(torch.float32)).contiguous()


def short_conv(u, weight, *, initial_state=None, cu_seqlens=None, activation="silu", want_state=False):
    """y_t[c] = act(sum_i weight[c, i] u_{t - taps + 1 + i}[c]); returns (y, final state or None).

    u, y [B, T, C]; weight [C, taps] or [C, 1, taps], 2 to 4 taps; states [N, taps - 1, C], the inputs before (or the
    last ones), oldest first; without one, zeros. cu_seqlens as in kilin.kda. activation: 'silu' or None, on the CPU
    'silu' only. The final state has u's dtype, on the CPU float32."""
    if activation not in (None, "silu", "swish"):
        raise ValueError(f"kilin: activation of the short convolution is {activation!r}, expected 'silu' or None")
    x = _checked("u", u)
    if not x.is_cuda and activation is None:
        raise NotImplementedError("kilin: the short convolution without SiLU is there for CUDA tensors only")
    if weight.dim() == 3:
        weight = weight.squeeze(1)
    if initial_state is not None:
        initial_state = initial_state.to(x.dtype).contiguous()
    y, state = short_conv_op(evenly_spaced(x.unsqueeze(2)).squeeze(2), _weight(weight, x), initial_state, cu_seqlens, activation is not None,
                             want_state)
    return y.to(u.dtype), state if want_state else None


def short_conv_update(u, weight, pool, slots, *, activation="silu"):
    """One token of each of N sequences: u [N, C]; pool [slots, taps - 1, C] of u's dtype (on the CPU float32), read
    and updated in place at slots [N]; a slot below 0 reads as zeros and is not written. No gradient."""
    x = _checked("u", u)
    if activation not in ((None, "silu", "swish") if x.is_cuda else ("silu", "swish")):
        raise ValueError(f"kilin: activation of the short convolution is {activation!r}, expected 'silu'"
                         + (" or None" if x.is_cuda else " (on the CPU)"))
    if weight.dim() == 3:
        weight = weight.squeeze(1)
    y = short_conv_update_op(x.contiguous(), _weight(weight, x), pool, slots.to(torch.int32).contiguous(),
                             activation is not None)
    return y.to(u.dtype)


def gated_rms_norm(x, z=None, weight=None, *, eps=1e-5, activation="sigmoid"):
    """y = weight * x / sqrt(mean(x^2) + eps) * act(z), the mean over the last dimension. x, z of the same shape [...,
    heads, D]; weight [D] or None; activation 'sigmoid', 'silu', or None without z."""
    if activation not in ACTIVATIONS or (activation is None) != (z is None):
        raise ValueError(f"kilin: activation is {activation!r}, expected 'sigmoid' or 'silu' with z, None without")
    if x.dim() < 2 or (z is not None and z.shape != x.shape):
        raise ValueError(f"kilin: x and z must have the same shape [..., heads, D], got {tuple(x.shape)}"
                         + ("" if z is None else f" and {tuple(z.shape)}"))
    rows = _checked("x", x).reshape(-1, *x.shape[-2:]).contiguous()
    gate = None if z is None else z.to(rows.dtype).reshape(rows.shape).contiguous()
    return gated_rms_norm_op(rows, gate, _weight(weight, x), eps, ACTIVATIONS[activation]).reshape(x.shape).to(x.dtype)
