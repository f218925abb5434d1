# SPDX-License-Identifier: Apache-2.0
"""The operators on a GPU against the float64 recurrence on the CPU. Skipped without a Hopper GPU or CUDA kernels."""
import pytest
import reference
import torch
from cases import KINDS, inputs

import kilin
from kilin import _ops, fla, vllm

pytestmark = pytest.mark.skipif(not kilin.cuda_available(), reason="no Hopper GPU, or no CUDA kernels in this build")

# bfloat16 products with float32 sums; outputs rounded to bfloat16
TOLERANCE = 6e-3
NAMES = ("q", "k", "v", "gate", "beta", "a_log", "dt_bias")


def cuda(x):
    return {n: t.cuda() if isinstance(t, torch.Tensor) else t for n, t in x.items()}


def case(batch, length, dim=64, **more):
    more = dict(heads=2, key_dim=dim, value_dim=dim, dtype=torch.bfloat16, **more)
    return inputs(batch, length, **more)


def close(got, expected, tolerance=TOLERANCE):
    assert reference.relative_error(got.cpu(), expected) < tolerance


@pytest.mark.parametrize("form", [_ops.BY_LENGTH, _ops.RECURRENT])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length, dim", [(0, 64), (1, 128), (63, 64), (64, 128), (65, 64), (300, 128)])
def test_forward(kind, length, dim, form):
    x = case(2, length, dim, gate_kind=kind, state=True)
    expected, expected_state = reference.kda(**x, gate_kind=kind)
    out, state, _ = kilin.kda(**cuda(x), gate_kind=KINDS[kind], form=form)
    assert out.dtype == torch.bfloat16 and state.dtype == torch.float32
    close(out, expected)
    close(state, expected_state)


@pytest.mark.parametrize("form", [_ops.BY_LENGTH, _ops.RECURRENT])
@pytest.mark.parametrize("integer", [torch.int32, torch.int64])
def test_sequences_of_different_lengths(integer, form):
    offsets = torch.tensor([0, 0, 1, 64, 64, 200, 333, 333], dtype=integer)
    x = case(1, 333, 128, sequences=7, state=True, value_heads=4)
    expected, expected_state = reference.kda(**x, gate_kind="softplus", cu_seqlens=offsets)
    out, state, _ = kilin.kda(**cuda(x), gate_kind=0, cu_seqlens=offsets.cuda(), form=form)
    close(out, expected)
    close(state, expected_state)
    assert torch.equal(state[3].cpu(), x["initial_state"][3])


def test_float16_and_float32_gate():
    x = inputs(1, 130, 2, key_dim=128, value_dim=128, dtype=torch.float16)
    x.update(gate=x["gate"].float(), beta=x["beta"].float())
    out, state, _ = kilin.kda(**cuda(x), gate_kind=0)
    expected, expected_state = reference.kda(**x, gate_kind="softplus")
    assert out.dtype == torch.float16
    close(out, expected)
    close(state, expected_state)


@pytest.mark.parametrize("key_dim, value_dim", [(60, 60), (100, 100), (64, 128), (128, 64), (32, 100)])
def test_other_head_sizes(key_dim, value_dim):
    x = inputs(1, 100, 2, key_dim=key_dim, value_dim=value_dim, dtype=torch.bfloat16, state=True)
    expected, expected_state = reference.kda(**x, gate_kind="softplus")
    y = cuda(x)
    for function in (fla.chunk_kda, fla.fused_recurrent_kda):
        o, state = function(y["q"], y["k"], y["v"], y["gate"], y["beta"], A_log=y["a_log"], dt_bias=y["dt_bias"],
                            initial_state=y["initial_state"].transpose(-1, -2).contiguous(), output_final_state=True,
                            use_qk_l2norm_in_kernel=True, use_gate_in_kernel=True, use_beta_sigmoid_in_kernel=True)
        assert o.shape == expected.shape
        close(o, expected)
        close(state.transpose(-1, -2), expected_state)


def test_slices_of_a_projection():
    x = case(1, 50)
    packed = torch.cat([x[n].flatten(2) for n in ("q", "k", "v", "gate", "beta")], -1).cuda()
    for extra in (0, 3):  # 3 more channels: tokens not aligned to 16 bytes, which are copied
        wide = torch.nn.functional.pad(packed, (0, 6 + extra))
        parts = wide[..., : packed.shape[-1]].split([128, 128, 128, 128, 2], -1)
        strided = dict(cuda(x), **{n: p.unflatten(-1, x[n].shape[2:])
                                   for n, p in zip(("q", "k", "v", "gate", "beta"), parts)})
        assert torch.equal(kilin.kda(**strided, gate_kind=0)[0], kilin.kda(**cuda(x), gate_kind=0)[0])


def test_chunk_states():
    x = case(2, 130)
    _, _, kept = kilin.kda(**cuda(x), gate_kind=0, chunk_states=6)
    head = {n: t[:, :64] if n in NAMES[:5] else t for n, t in x.items()}
    close(kept[1], reference.kda(**head, gate_kind="softplus")[1][0])
    close(kept[4], reference.kda(**head, gate_kind="softplus")[1][1])
    assert not kept[0].any() and not kept[3].any()


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_pool_of_vllm(kind):
    slots = torch.tensor([3, 0, 5, -1], dtype=torch.int32)
    offsets = torch.tensor([0, 1, 2, 4, 5], dtype=torch.int32)
    x = case(1, 5, 128)
    pool = torch.full((6, 2, 128, 128), 1e30).to(kind)
    pool[[3, 5]] = torch.randn(2, 2, 128, 128).to(kind)
    start = torch.zeros(4, 2, 128, 128)
    start[[0, 2]] = pool[[3, 5]].float()
    expected, expected_state = reference.kda(**x, gate_kind="bounded", cu_seqlens=offsets, initial_state=start)
    y, after = cuda(x), pool.cuda()
    out, _ = vllm.fused_recurrent_kda(*(y[n] for n in NAMES), -5.0, after, offsets.cuda(), slots.cuda())
    close(out[:, [0, 2, 3]], expected[:, [0, 2, 3]])
    assert not out[:, [1, 4]].any()
    close(after[3], expected_state[0])
    close(after[5], expected_state[2])
    assert torch.equal(after[[0, 1, 2, 4]].cpu(), pool[[0, 1, 2, 4]])


def test_packed_decode():
    slots = torch.tensor([3, 0, 5], dtype=torch.int32)
    x = case(1, 3, 128)
    pool = torch.randn(6, 2, 128, 128)
    packed = torch.cat([*(x[n][0].flatten(1) for n in ("q", "k", "v")), torch.full((3, 24), 9.0, dtype=torch.bfloat16)], 1)
    packed = packed.cuda()
    expected, expected_state = reference.kda(**x, gate_kind="softplus", cu_seqlens=torch.arange(4),
                                             initial_state=pool[slots.long()])
    y, after = cuda(x), pool.cuda()
    out, _ = vllm.fused_recurrent_kda_packed_decode(packed, y["gate"], y["beta"], y["a_log"], y["dt_bias"], None, after,
                                                    slots.cuda())
    close(out[:, [0, 2]], expected[:, [0, 2]])
    assert not out[:, 1].any() and torch.equal(after[0].cpu(), pool[0])
    close(after[[3, 5]], expected_state[[0, 2]])


def test_speculation():
    """Three drafted tokens a call; each call starts from the state after the last accepted one."""
    x = case(1, 6, 128)
    slots = torch.tensor([[1, 2, 3], [4, 5, 6]], dtype=torch.int32)
    offsets = torch.tensor([0, 3, 6], dtype=torch.int32)
    pool = torch.randn(7, 2, 128, 128)
    accepted = torch.tensor([1, 3], dtype=torch.int32)
    start = pool[[1, 6]]
    y, after = cuda(x), pool.cuda()
    out, _ = vllm.fused_recurrent_kda(*(y[n] for n in NAMES), None, after, offsets.cuda(), slots.cuda(),
                                      accepted.cuda())
    expected, _ = reference.kda(**x, gate_kind="softplus", cu_seqlens=offsets, initial_state=start)
    close(out, expected)
    for tokens in (1, 2, 3):
        parts = {n: torch.cat([t[:, :tokens], t[:, 3:3 + tokens]], 1) if n in NAMES[:5] else t for n, t in x.items()}
        _, state = reference.kda(**parts, gate_kind="softplus", cu_seqlens=torch.tensor([0, tokens, 2 * tokens]),
                                 initial_state=start)
        close(after[slots[:, tokens - 1].long().cuda()], state)


@pytest.mark.parametrize("form", [_ops.CHUNK, _ops.RECURRENT])
def test_graph(form):
    """Calls are captured and replayed on new inputs, on a stream that is not the default one."""
    x = cuda(case(1, 100, 128))
    y = cuda(case(1, 100, 128, seed=5))
    kilin.kda(**x, gate_kind=0, form=form)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, state, _ = kilin.kda(**x, gate_kind=0, form=form)
    for name in NAMES:
        x[name].copy_(y[name])
    graph.replay()
    expected, expected_state, _ = kilin.kda(**y, gate_kind=0, form=form)
    assert torch.equal(out, expected) and torch.equal(state, expected_state)


def test_compile_whole_graph():
    x = cuda(case(1, 20))
    function = torch.compile(lambda q: kilin.kda(**dict(x, q=q * 2), gate_kind=0)[0].sin(), fullgraph=True,
                             backend="aot_eager")
    expected = kilin.kda(**dict(x, q=x["q"] * 2), gate_kind=0)[0].sin()
    assert torch.equal(function(x["q"]), expected)


def test_opcheck():
    x = cuda(case(1, 20, state=True))
    torch.library.opcheck(torch.ops.kilin.kda.default,
                          (*(x[n] for n in NAMES), x["initial_state"], None, 0.1, 0, -5.0, True, True, 1.0, 0, True, 1),
                          test_utils=("test_schema", "test_faketensor"))


def test_errors():
    x = cuda(case(1, 8))
    with pytest.raises(TypeError, match="float32"):
        kilin.kda(**dict(x, q=x["q"].float(), k=x["k"].float(), v=x["v"].float()), gate_kind=0)
    with pytest.raises(RuntimeError, match="another device"):
        kilin.kda(**dict(x, k=x["k"].cpu()), gate_kind=0)
    with pytest.raises(NotImplementedError, match="256"):
        fla.chunk_kda(*(torch.zeros(1, 8, 2, 256, dtype=torch.bfloat16, device="cuda") for _ in range(4)),
                      torch.zeros(1, 8, 2, device="cuda"))
