# SPDX-License-Identifier: Apache-2.0
"""Short convolution and gated RMSNorm, with gradients, against float64 on the CPU; on a GPU too where there is one."""
import pytest
import torch

import kilin
from kilin import layer

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not kilin.cuda_available(), reason="no Hopper GPU"))]
CASES = [(d, t) for d in ("cpu", "cuda") for t in (torch.float32, torch.bfloat16, torch.float16)
         if d == "cpu" or t != torch.float32]
CASES = [pytest.param(d, t, marks=pytest.mark.skipif(d == "cuda" and not kilin.cuda_available(),
                                                     reason="no Hopper GPU")) for d, t in CASES]


def tolerance(dtype):
    return {torch.float32: 1e-5, torch.bfloat16: 8e-3, torch.float16: 1e-3}[dtype]


def close(got, expected, limit):
    got, expected = got.detach().cpu().double(), expected.detach()
    assert got.shape == expected.shape
    assert torch.isfinite(got).all()
    error = ((got - expected).norm() / expected.norm().clamp_min(1e-30)).item() if expected.numel() else 0.0
    assert error < limit, error


def conv_reference(u, weight, state, pieces, silu=True):
    y, after = torch.zeros_like(u), []
    for n, (b, begin, end) in enumerate(pieces):
        inputs = torch.cat([state[n], u[b, begin:end]])
        windows = torch.stack([inputs[i:i + end - begin] for i in range(weight.shape[1])], -1)
        z = (windows * weight).sum(-1)
        y[b, begin:end] = torch.nn.functional.silu(z) if silu else z
        after.append(inputs[end - begin:])
    return y, torch.stack(after)


@pytest.mark.parametrize("taps", [2, 3, 4])
@pytest.mark.parametrize("lengths", [[37], [0, 1, 2, 3, 40, 5]])
@pytest.mark.parametrize("device, dtype", CASES)
def test_short_conv(device, dtype, lengths, taps):
    generator = torch.Generator().manual_seed(taps)

    def normal(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    tokens, channels = sum(lengths), 24
    u, weight, state = normal(1, tokens, channels), normal(channels, taps), normal(len(lengths), taps - 1, channels)
    dy, d_state = normal(1, tokens, channels), normal(len(lengths), taps - 1, channels)
    bounds = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    for silu in (True, False) if device == "cuda" else (True,):
        leaves = [t.double().requires_grad_() for t in (u, weight, state)]
        y, after = conv_reference(*leaves, [(0, a, b) for a, b in zip(bounds, bounds[1:])], silu)
        expected = torch.autograd.grad((y * dy).sum() + (after * d_state).sum(), leaves)
        own = [t.to(device).requires_grad_() for t in (u, weight, state)]
        got, got_after = layer.short_conv(
            own[0], own[1], initial_state=own[2], activation="silu" if silu else None, want_state=True,
            cu_seqlens=torch.tensor(bounds, device=device) if len(lengths) > 1 else None)
        assert got.dtype == dtype
        close(got, y, tolerance(dtype))
        assert torch.equal(got_after.cpu().double(), after)
        gradients = torch.autograd.grad((got * dy.to(device)).sum() + (got_after * d_state.to(device)).sum(), own)
        for name, g, e in zip(("u", "weight", "state"), gradients, expected):
            assert g.dtype == dtype, name
            close(g, e, 2 * tolerance(dtype))


@pytest.mark.parametrize("device, dtype", CASES)
def test_short_conv_of_a_batch_and_of_slices(device, dtype):
    u, weight = torch.randn(3, 10, 48).to(dtype), torch.randn(16, 1, 4).to(dtype)
    zeros = torch.zeros(3, 3, 16, dtype=torch.float64)
    part = u[..., 16:32]
    expected, _ = conv_reference(part.double(), weight[:, 0].double(), zeros, [(b, 0, 10) for b in range(3)])
    got, state = layer.short_conv(u.to(device)[..., 16:32], weight.to(device))
    assert state is None
    close(got, expected, tolerance(dtype))


@pytest.mark.parametrize("device, dtype", CASES)
def test_short_conv_update(device, dtype):
    kind = torch.float32 if device == "cpu" else dtype
    pool, weight = torch.randn(6, 3, 16).to(kind), torch.randn(16, 4).to(dtype)
    slots = torch.tensor([4, -1, 2])
    state = pool[[4, 0, 2]].double()
    state[1] = 0
    after = pool.to(device)
    for _ in range(2):
        u = torch.randn(3, 16).to(dtype)
        expected, state = conv_reference(u[:, None].double(), weight.double(), state, [(n, 0, 1) for n in range(3)])
        state[1] = 0
        close(layer.short_conv_update(u.to(device), weight.to(device), after, slots.to(device)), expected[:, 0],
              tolerance(dtype))
    assert torch.equal(after.cpu()[[4, 2]].double(), state[[0, 2]])
    assert torch.equal(after.cpu()[[0, 1, 3, 5]], pool[[0, 1, 3, 5]])


@pytest.mark.parametrize("activation", ["sigmoid", "silu", None])
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("device, dtype", CASES)
def test_gated_rms_norm(device, dtype, weighted, activation):
    shape = (2, 9, 3, 64)
    x, z, dy = (torch.randn(*shape).to(dtype) for _ in range(3))
    weight = torch.randn(64).to(dtype) if weighted else None
    names = {"x": x, **({"z": z} if activation else {}), **({"weight": weight} if weighted else {})}
    leaves = {n: t.double().requires_grad_() for n, t in names.items()}
    y = leaves["x"] * torch.rsqrt(leaves["x"].square().mean(-1, keepdim=True) + 1e-5)
    if weighted:
        y = y * leaves["weight"]
    if activation:
        y = y * (torch.sigmoid if activation == "sigmoid" else torch.nn.functional.silu)(leaves["z"])
    expected = torch.autograd.grad((y * dy).sum(), list(leaves.values()))
    own = {n: t.to(device).requires_grad_() for n, t in names.items()}
    got = layer.gated_rms_norm(**own, activation=activation)
    assert got.dtype == dtype
    close(got, y, tolerance(dtype))
    for name, g, e in zip(own, torch.autograd.grad((got * dy.to(device)).sum(), list(own.values())), expected):
        assert g.dtype == dtype, name
        close(g, e, 2 * tolerance(dtype))


@pytest.mark.parametrize("device", DEVICES)
def test_opcheck(device):
    kind = torch.float32 if device == "cpu" else torch.bfloat16

    def leaf(*shape):
        return torch.randn(*shape).to(device, kind).requires_grad_()

    utils = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    bounds = torch.tensor([0, 5, 12], device=device)
    torch.library.opcheck(layer.short_conv_op, (leaf(1, 12, 16), leaf(16, 4), leaf(2, 3, 16), bounds, True, True),
                          test_utils=utils, atol=2e-2, rtol=2e-2)
    torch.library.opcheck(layer.gated_rms_norm_op, (leaf(7, 2, 64), leaf(7, 2, 64), leaf(64), 1e-5, 2),
                          test_utils=utils, atol=2e-2, rtol=2e-2)


def test_errors():
    u, weight = torch.randn(1, 4, 8), torch.randn(8, 4)
    with pytest.raises(NotImplementedError, match="without SiLU"):
        layer.short_conv(u, weight, activation=None)
    with pytest.raises(ValueError, match="activation"):
        layer.short_conv(u, weight, activation="tanh")
    with pytest.raises(RuntimeError, match="weight must be"):
        layer.short_conv(u, weight[:4])
    with pytest.raises(RuntimeError, match="taps"):
        layer.short_conv(u, torch.randn(8, 7))
    with pytest.raises(ValueError, match="with z"):
        layer.gated_rms_norm(u, activation="silu")
    with pytest.raises(TypeError, match="float64"):
        layer.gated_rms_norm(u.double(), activation=None)
