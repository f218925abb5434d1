# SPDX-License-Identifier: Apache-2.0
"""KDA token by token in float64 with plain torch operations, written from the definition (arXiv:2510.26692,
section 3), for the tests. Its gradients are autograd's."""
import torch


def kda(q, k, v, gate, beta, *, a_log=None, dt_bias=None, scale=None, initial_state=None, cu_seqlens=None,
        gate_kind="none", lower_bound=-5.0, l2norm=False, beta_is_logit=False, beta_scale=1.0):
    """(out [B, T, HV, V], final states [N, HV, V, K]) in float64. gate_kind: 'softplus', 'bounded' or 'none'."""
    q, k, v, gate, beta = (x.double() for x in (q, k, v, gate, beta))
    value_heads, key_dim = gate.shape[2:]
    scale = key_dim ** -0.5 if scale is None else scale
    if l2norm:
        q = q / torch.sqrt((q * q).sum(-1, keepdim=True) + 1e-6)
        k = k / torch.sqrt((k * k).sum(-1, keepdim=True) + 1e-6)
    if gate_kind != "none":
        rate = torch.ones(value_heads, dtype=torch.float64) if a_log is None else a_log.double().exp()
        x = gate if dt_bias is None else gate + dt_bias.double().reshape(value_heads, key_dim)
        rate = rate[:, None]
        gate = lower_bound * torch.sigmoid(rate * x) if gate_kind == "bounded" else -rate * torch.log1p(x.exp())
    if beta_is_logit:
        beta = torch.sigmoid(beta)
    beta = beta_scale * beta
    repeat = value_heads // q.shape[2]
    q, k = (x.repeat_interleave(repeat, 2) for x in (q, k))
    if cu_seqlens is None:
        pieces = [(b, 0, q.shape[1]) for b in range(q.shape[0])]
    else:
        offsets = [int(x) for x in cu_seqlens]
        pieces = [(0, a, e) for a, e in zip(offsets, offsets[1:])]
    rows, states = [], []
    for n, (b, begin, end) in enumerate(pieces):
        state = torch.zeros(value_heads, v.shape[3], key_dim, dtype=torch.float64)
        if initial_state is not None:
            state = initial_state[n].double()
        for t in range(begin, end):
            state = state * gate[b, t].exp()[:, None, :]
            correction = v[b, t] - (state * k[b, t][:, None, :]).sum(-1)
            state = state + (beta[b, t][:, None] * correction)[:, :, None] * k[b, t][:, None, :]
            rows.append((state * (scale * q[b, t])[:, None, :]).sum(-1))
        states.append(state)
    out = torch.stack(rows).reshape(v.shape) if rows else v.new_zeros(v.shape)
    return out, torch.stack(states) if states else v.new_zeros(0, value_heads, v.shape[3], key_dim)


def relative_error(got, expected):
    """RMS of the difference over RMS of the expectation (and NaN is an error)."""
    got, expected = got.detach().double(), expected.detach().double()
    assert got.shape == expected.shape, (got.shape, expected.shape)
    if expected.numel() == 0:
        return 0.0
    difference = (got - expected).square().mean().sqrt()
    size = expected.square().mean().sqrt()
    if size == 0:
        return difference.item()
    return (difference / size).item() if torch.isfinite(got).all() else float("inf")
