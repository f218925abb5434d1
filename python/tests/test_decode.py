# SPDX-License-Identifier: Apache-2.0
"""kilin.kda_decode and vLLM's fused_kda_decode against float64 on the CPU; on a GPU too where there is one."""
import pytest
import reference
import torch

import kilin
from kilin import vllm

GPU = pytest.mark.skipif(not kilin.cuda_available(), reason="no Hopper GPU")
DEVICES = [pytest.param("cpu", torch.float32), pytest.param("cpu", torch.bfloat16),
           pytest.param("cuda", torch.bfloat16, marks=GPU), pytest.param("cuda", torch.float16, marks=GPU)]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 8e-3, torch.float16: 1e-3}
SLOTS = [3, 0, 5, 1, -1]  # of five sequences; with first_slot 1 the second is padding, the last one always


class Problem:
    """Inputs of a step, rounded to dtype, and what it has to give in float64."""

    def __init__(self, dtype, heads=2, value_heads=2, dim=128, rows=3, first_slot=1, gate_kind="softplus", seed=0):
        self.generator = torch.Generator().manual_seed(seed)
        self.dtype, self.kind, self.first_slot = dtype, gate_kind, first_slot
        self.heads, self.value_heads, self.dim = heads, value_heads, dim
        n, channels = len(SLOTS), (2 * heads + value_heads) * dim
        self.wide = self.normal(n, channels + 24)  # the projection: more follows q, k and v
        self.qkv = self.wide[:, :channels]
        self.gate, self.beta = self.normal(n, value_heads, dim), self.normal(n, value_heads)
        self.z, self.norm_weight = self.normal(n, value_heads, dim), 1 + 0.3 * self.normal(dim, kind=torch.float32)
        self.a_log = 0.5 * self.normal(value_heads, kind=torch.float32)
        self.dt_bias = self.normal(value_heads * dim, kind=torch.float32) - 2
        self.weight = 0.6 * self.normal(channels, 4, kind=torch.float32)
        self.pool = self.normal(6, value_heads, dim, dim, kind=torch.float32)
        self.conv_state = self.normal(6, rows, channels)
        self.slots = torch.tensor(SLOTS, dtype=torch.int32)

    def normal(self, *shape, kind=None):
        return torch.randn(*shape, generator=self.generator).to(kind or self.dtype)

    def expected(self, norm=True):
        """(out, pool, conv_state)"""
        out, pool, conv = torch.zeros(len(SLOTS), self.value_heads, self.dim).double(), self.pool.double(), self.conv_state.clone()
        keys = self.heads * self.dim
        for n, slot in enumerate(SLOTS):
            if slot < self.first_slot:
                continue
            window = torch.cat([self.conv_state[slot, :3], self.qkv[n:n + 1]])  # [4, channels]
            y = torch.nn.functional.silu((window.double() * self.weight.double().T).sum(0))
            conv[slot, :3] = window[1:]
            q, k, v = (x.view(1, 1, -1, self.dim) for x in y.split([keys, keys, self.value_heads * self.dim]))
            o, state = reference.kda(q, k, v, self.gate[n].view(1, 1, -1, self.dim), self.beta[n].view(1, 1, -1),
                                     a_log=self.a_log, dt_bias=self.dt_bias, gate_kind=self.kind, l2norm=True,
                                     beta_is_logit=True, initial_state=self.pool[slot:slot + 1])
            pool[slot], o = state[0], o[0, 0]
            if norm:
                o = o * torch.rsqrt(o.square().mean(-1, keepdim=True) + 1e-5) * self.norm_weight.double()
                o = o * torch.sigmoid(self.z[n].double())
            out[n] = o
        return out, pool, conv

    def to(self, device):
        for name, value in vars(self).items():
            if isinstance(value, torch.Tensor):
                setattr(self, name, value.to(device))
        self.qkv = self.wide[:, :self.qkv.shape[1]]
        return self

    def check(self, out, expected):
        for n, slot in enumerate(SLOTS):
            if slot < self.first_slot:
                assert not out[n].any()
            else:
                assert reference.relative_error(out[n].cpu(), expected[0][n]) < TOLERANCE[self.dtype]
        used = [slot for slot in SLOTS if slot >= self.first_slot]
        for slot in range(6):
            if slot in used:
                assert reference.relative_error(self.pool[slot].cpu(), expected[1][slot]) < 1e-5
            else:
                assert torch.equal(self.pool[slot].cpu().double(), expected[1][slot])
        assert torch.equal(self.conv_state.cpu(), expected[2])


@pytest.mark.parametrize("shape", [dict(), dict(dim=64, gate_kind="bounded"), dict(value_heads=4, rows=5),
                                   dict(heads=3, value_heads=3, first_slot=0)])
@pytest.mark.parametrize("device, dtype", DEVICES)
def test_layer(device, dtype, shape):
    p = Problem(dtype, **shape)
    expected = p.expected()
    p.to(device)
    out = kilin.kda_decode(p.qkv, p.gate, p.beta, p.pool, p.slots, conv_state=p.conv_state, conv_weight=p.weight.unsqueeze(1),
                           a_log=p.a_log, dt_bias=p.dt_bias, norm_weight=p.norm_weight, z=p.z, first_slot=p.first_slot,
                           gate_kind={"softplus": kilin.SOFTPLUS, "bounded": kilin.BOUNDED}[p.kind])
    assert out.dtype == dtype
    p.check(out, expected)


@pytest.mark.parametrize("device, dtype", DEVICES)
def test_without_norm(device, dtype):
    p = Problem(dtype)
    expected = p.expected(norm=False)
    p.to(device)
    with pytest.raises(ValueError, match="norm_weight"):
        kilin.kda_decode(p.qkv, p.gate, p.beta, p.pool, p.slots, conv_state=p.conv_state, conv_weight=p.weight, z=p.z)
    got = kilin.kda_decode(p.qkv, p.gate, p.beta, p.pool, p.slots, conv_state=p.conv_state, conv_weight=p.weight,
                           a_log=p.a_log, dt_bias=p.dt_bias, first_slot=1)
    p.check(got, expected)


@pytest.mark.parametrize("device, dtype", DEVICES)
def test_of_vllm(device, dtype):
    p = Problem(dtype, heads=3, value_heads=3, gate_kind="bounded")
    expected = p.expected()
    p.to(device)
    tap_rows = p.weight.view(3, -1, 4).transpose(1, 2).contiguous()  # [3, 4, H K]
    out = torch.full((1, len(SLOTS), 3, 128), 7.0, dtype=dtype, device=device)
    returned = vllm.fused_kda_decode(
        x=p.qkv, weight=tap_rows, bias=None, conv_state=p.conv_state.transpose(-1, -2), raw_g=p.gate.unsqueeze(0),
        raw_beta=p.beta.unsqueeze(0), A_log=p.a_log, dt_bias=p.dt_bias, state_indices=p.slots, state=p.pool, out=out,
        lower_bound=-5.0, output_gate=p.z, norm_weight=p.norm_weight, norm_eps=1e-5)
    assert returned is out
    p.check(out[0], expected)
    arguments = (p.qkv, tap_rows, None, p.conv_state.transpose(-1, -2), p.gate.unsqueeze(0), p.beta.unsqueeze(0), p.a_log,
                 p.dt_bias, p.slots, p.pool)
    with pytest.raises(NotImplementedError, match="bias"):
        vllm.fused_kda_decode(*arguments[:2], tap_rows, *arguments[3:])
    with pytest.raises(NotImplementedError, match="DS"):
        vllm.fused_kda_decode(*arguments[:3], p.conv_state.transpose(-1, -2).contiguous(), *arguments[4:])
    with pytest.raises(ValueError, match="output_gate"):
        vllm.fused_kda_decode(*arguments, norm_weight=p.norm_weight)


@GPU
def test_wrong_arguments():
    p = Problem(torch.bfloat16).to("cuda")

    def run(match, **changed):
        given = dict(qkv=p.qkv, gate=p.gate, beta=p.beta, pool=p.pool, slots=p.slots, conv_state=p.conv_state,
                     conv_weight=p.weight)
        with pytest.raises(RuntimeError, match=match):
            kilin.kda_decode(**dict(given, **changed))

    run("channels", qkv=p.qkv[:, :700])
    run("gate", gate=p.gate[:4])
    run("slots", slots=p.slots[:4])
    run("conv_weight", conv_weight=p.weight[:700])
    run("conv_state", conv_state=p.conv_state[:, :, :700])
    run("rows", conv_state=p.conv_state[:, :2])
    run("type of qkv", conv_state=p.conv_state.half())
    run("32 x 32", pool=p.pool[:, :, :32, :32])
    run("within a token", out=torch.empty(len(SLOTS), 2, 256, dtype=torch.bfloat16, device="cuda")[..., :128])


@GPU
def test_graph():
    """A captured step replayed on new inputs gives what a plain call gives."""
    def step(p):
        return kilin.kda_decode(p.qkv, p.gate, p.beta, p.pool, p.slots, conv_state=p.conv_state, conv_weight=p.weight,
                                a_log=p.a_log, dt_bias=p.dt_bias, norm_weight=p.norm_weight, z=p.z, first_slot=1)

    captured, plain = Problem(torch.bfloat16).to("cuda"), Problem(torch.bfloat16).to("cuda")
    step(Problem(torch.bfloat16).to("cuda"))
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step(captured)
    for _ in range(3):
        graph.replay()
        assert torch.equal(out, step(plain))
    assert torch.equal(captured.pool, plain.pool) and torch.equal(captured.conv_state, plain.conv_state)
