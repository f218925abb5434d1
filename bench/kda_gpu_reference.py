# SPDX-License-Identifier: Apache-2.0
"""Inputs and the float64 recurrence for bench/kda_gpu.py.

Layouts: q, k [B, T, H, K]; v [B, T, HV, V]; g [B, T, HV, K]; beta [B, T, HV]; states [N, HV, V, K].
The recurrence is the one of src/kernels/kda/kda.h.
"""
import dataclasses

import torch


@dataclasses.dataclass
class Inputs:
    """One call. gate: 'softplus', 'bounded' (g is raw, A_log and dt_bias apply) or 'none' (g is the log decay)."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    g: torch.Tensor
    beta: torch.Tensor  # logits
    a_log: torch.Tensor  # [HV] float32
    dt_bias: torch.Tensor  # [HV * K] float32
    gate: str
    lower_bound: float = -5.0
    beta_scale: float = 1.0
    cu_seqlens: torch.Tensor | None = None  # int64 [N + 1], then B is 1
    initial_state: torch.Tensor | None = None  # float32 [N, HV, V, K]

    @property
    def scale(self):
        return self.q.shape[-1] ** -0.5

    @property
    def sequences(self):
        return self.q.shape[0] if self.cu_seqlens is None else self.cu_seqlens.numel() - 1

    def nbytes(self):
        """Bytes that have to move at least once: inputs, output, final state, initial state if there is one."""
        state = self.sequences * self.v.shape[2] * self.v.shape[3] * self.k.shape[3] * 4
        tensors = [self.q, self.k, self.v, self.g, self.beta, self.v]  # o is like v
        return sum(t.numel() * t.element_size() for t in tensors) + state * (2 if self.initial_state is not None else 1)

    def leaves(self):
        return [self.q, self.k, self.v, self.g, self.beta]


def make_inputs(tokens, heads, *, batch=1, value_heads=None, dim=128, gate="bounded", cu_seqlens=None, seed=0,
                initial=False, dtype=torch.bfloat16, device="cuda"):
    """Random inputs like a trained model's: decays between a few tokens and some thousands, beta around 1/2."""
    value_heads = value_heads or heads
    generator = torch.Generator(device=device).manual_seed(seed)

    def normal(*shape, scale=1.0, mean=0.0, kind=dtype):
        return (torch.randn(*shape, generator=generator, device=device) * scale + mean).to(kind)

    sequences = batch if cu_seqlens is None else len(cu_seqlens) - 1
    a_log = torch.rand(value_heads, generator=generator, device=device) * 2.7
    bias = -3.0 if gate == "softplus" else -4.0
    return Inputs(
        q=normal(batch, tokens, heads, dim), k=normal(batch, tokens, heads, dim),
        v=normal(batch, tokens, value_heads, dim), g=normal(batch, tokens, value_heads, dim),
        beta=normal(batch, tokens, value_heads),
        a_log=a_log if gate == "softplus" else a_log * 0.3,
        dt_bias=normal(value_heads * dim, scale=1.0, mean=bias, kind=torch.float32), gate=gate,
        cu_seqlens=None if cu_seqlens is None else torch.tensor(cu_seqlens, dtype=torch.int64, device=device),
        initial_state=normal(sequences, value_heads, dim, dim, kind=torch.float32) if initial else None)


def accuracy_cases(device="cuda"):
    """(name, Inputs). Every case is one that some implementation was seen to get wrong somewhere."""
    cases = []

    def add(name, tokens=512, heads=2, **kwargs):
        x = make_inputs(tokens, heads, device=device, seed=len(cases) + 1, **kwargs)
        cases.append((name, x))
        return x

    add("random softplus", gate="softplus", initial=True)
    add("random bounded", gate="bounded", initial=True)
    add("varlen bounded", tokens=513, gate="bounded", cu_seqlens=[0, 1, 64, 64, 129, 300, 513])
    add("varlen softplus", tokens=513, gate="softplus", cu_seqlens=[0, 1, 64, 64, 129, 300, 513], initial=True)
    add("grouped heads softplus", gate="softplus", value_heads=4)
    # log decays of about -1e-4: memory over the whole sequence
    x = add("long decay bounded T4096", tokens=4096, gate="bounded")
    x.dt_bias -= 7.0
    x = add("long decay softplus T4096", tokens=4096, gate="softplus")
    x.dt_bias -= 7.0
    x = add("g = 0 bounded", tokens=1024, gate="bounded")
    x.g.fill_(-300.0)
    x = add("g = 0 given", tokens=1024, gate="none")
    x.g = torch.zeros_like(x.g, dtype=torch.float32)
    # the strongest decay that the bounded gate gives, next to none
    x = add("g = -5 in parts, bounded", gate="bounded")
    x.g = torch.where(torch.rand_like(x.g, dtype=torch.float32) < 0.5, 300.0, -300.0).to(x.g.dtype)
    x = add("g = -1000 in parts, given", gate="none")
    mask = torch.rand_like(x.g, dtype=torch.float32)
    x.g = torch.where(mask < 0.1, -1000.0, -0.05 * mask)
    x = add("strong softplus decay", gate="softplus")
    x.a_log.fill_(2.7)
    x.dt_bias += 6.0
    # few different keys, written again and again
    for name, beta_scale in (("repeated keys, beta near 1", 1.0), ("repeated keys, beta near 2", 2.0)):
        x = add(name, gate="bounded")
        keys = x.k[:, :4]
        x.k = keys[:, torch.randint(0, 4, (x.k.shape[1],), device=device)].contiguous()
        x.dt_bias -= 5.0
        x.beta = (x.beta.float() + 6.0).to(x.beta.dtype)
        x.beta_scale = beta_scale
    return cases


def transforms(x, dtype=torch.float64):
    """q, k, v, log decay and beta after the in-kernel transforms, in dtype."""
    q, k, v, g, beta = (t.to(dtype) for t in x.leaves())
    q = q / (q.square().sum(-1, keepdim=True) + 1e-6).sqrt()
    k = k / (k.square().sum(-1, keepdim=True) + 1e-6).sqrt()
    if x.gate != "none":
        a = x.a_log.to(dtype).exp()[:, None]
        g = g + x.dt_bias.to(dtype).view(g.shape[2], g.shape[3])
        g = x.lower_bound * torch.sigmoid(a * g) if x.gate == "bounded" else -a * torch.nn.functional.softplus(g)
    return q * x.scale, k, v, g, x.beta_scale * torch.sigmoid(beta)


def recurrence(x, dtype=torch.float64):
    """(o [B, T, HV, V], final state [N, HV, V, K]) token by token, all heads at once; differentiable."""
    q, k, v, g, beta = transforms(x, dtype)
    groups = v.shape[2] // q.shape[2]
    q, k = (t.repeat_interleave(groups, dim=2) for t in (q, k))
    if x.cu_seqlens is None:
        bounds = [(b, 0, q.shape[1]) for b in range(q.shape[0])]
    else:
        offsets = x.cu_seqlens.tolist()
        bounds = [(0, begin, end) for begin, end in zip(offsets, offsets[1:])]
    outputs, states = [], []
    decay = g.exp()
    for n, (b, begin, end) in enumerate(bounds):
        if x.initial_state is None:
            state = torch.zeros(v.shape[2], v.shape[3], k.shape[3], dtype=dtype, device=v.device)
        else:
            state = x.initial_state[n].to(dtype)
        for t in range(begin, end):
            state = state * decay[b, t, :, None, :]
            delta = beta[b, t, :, None] * (v[b, t] - torch.einsum("hvk,hk->hv", state, k[b, t]))
            state = state + delta[..., None] * k[b, t, :, None, :]
            outputs.append(torch.einsum("hvk,hk->hv", state, q[b, t]))
        states.append(state)
    return torch.stack(outputs).view(v.shape), torch.stack(states)


def errors(got, expected):
    """(RMS of the difference over RMS of the expectation, largest absolute difference); inf where not finite."""
    got, expected = got.double(), expected.double()
    if not torch.isfinite(got).all():
        return float("inf"), float("inf")
    difference = got - expected
    rms = expected.square().mean().sqrt()
    return (difference.square().mean().sqrt() / rms.clamp_min(1e-300)).item(), difference.abs().max().item()
