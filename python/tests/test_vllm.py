# SPDX-License-Identifier: Apache-2.0
"""kilin.vllm: pools, null blocks, packed projections."""
import pytest
import reference
import torch
from cases import inputs

from kilin import vllm

TOLERANCE = 5e-6
NAMES = ("q", "k", "v", "gate", "beta", "a_log", "dt_bias")


def test_prefill():
    offsets = torch.tensor([0, 20, 20, 33], dtype=torch.int32)
    x = inputs(1, 33, sequences=3, state=True)
    for lower_bound, kind in ((None, "softplus"), (-5.0, "bounded")):
        expected, expected_state = reference.kda(**x, gate_kind=kind, cu_seqlens=offsets)
        o, state = vllm.chunk_kda_with_fused_gate(
            *(x[n] for n in NAMES), initial_state=x["initial_state"], output_final_state=True,
            lower_bound=lower_bound, use_qk_l2norm_in_kernel=True, cu_seqlens=offsets)
        assert reference.relative_error(o, expected) < TOLERANCE
        assert reference.relative_error(state, expected_state) < TOLERANCE
    with pytest.raises(TypeError, match="nonsense"):
        vllm.chunk_kda_with_fused_gate(*(x[n] for n in NAMES), nonsense=1)


def test_flash_kda():
    x = inputs(2, 33, state=True)
    expected, expected_state = reference.kda(**x, gate_kind="bounded", lower_bound=-4.0)
    out, state = torch.full_like(x["v"], 7.0), torch.full_like(x["initial_state"], 7.0)
    vllm.flash_kda_fwd(*(x[n] for n in NAMES[:5]), 32 ** -0.5, out, x["a_log"], x["dt_bias"].view(2, 32), -4.0,
                       x["initial_state"], state)
    assert reference.relative_error(out, expected) < TOLERANCE
    assert reference.relative_error(state, expected_state) < TOLERANCE


def check_decode(run, x, offsets, slots, kind):
    pool = torch.full((6, 2, 48, 32), 1e30)
    used = [n for n, s in enumerate(slots.tolist()) if s > 0]
    pool[slots[used].long()] = torch.randn(len(used), 2, 48, 32)
    before = pool.clone()
    start = before[slots.clamp(min=0).long()]
    start[[n for n in range(len(slots)) if n not in used]] = 0
    expected, expected_state = reference.kda(**x, gate_kind=kind, cu_seqlens=offsets, initial_state=start)
    out, returned = run(pool)
    assert returned is pool
    for n, (begin, end) in enumerate(zip(offsets.tolist(), offsets.tolist()[1:])):
        if n in used:
            assert reference.relative_error(out[:, begin:end], expected[:, begin:end]) < TOLERANCE
            assert reference.relative_error(pool[slots[n]], expected_state[n]) < TOLERANCE
        else:
            assert not out[:, begin:end].any()
    untouched = [s for s in range(6) if s not in [slots[n].item() for n in used]]
    assert torch.equal(pool[untouched], before[untouched])


def test_decode():
    slots = torch.tensor([3, 0, 5, -1], dtype=torch.int32)
    for offsets in (torch.arange(5, dtype=torch.int32), torch.tensor([0, 2, 4, 4, 7], dtype=torch.int32)):
        x = inputs(1, int(offsets[-1]))
        check_decode(lambda pool: vllm.fused_recurrent_kda(*(x[n] for n in NAMES), None, pool, offsets, slots),
                     x, offsets, slots, "softplus")


def test_packed_decode():
    slots = torch.tensor([3, 0, 5], dtype=torch.int32)
    x = inputs(1, 3)
    # the output gate's projection follows q, k and v in the same rows
    packed = torch.cat([*(x[n][0].flatten(1) for n in ("q", "k", "v")), torch.full((3, 10), 9.0)], 1)
    check_decode(lambda pool: vllm.fused_recurrent_kda_packed_decode(
        packed, x["gate"], x["beta"], x["a_log"], x["dt_bias"], -5.0, pool, slots),
        x, torch.arange(4), slots, "bounded")
    with pytest.raises(ValueError, match="channels"):
        vllm.fused_recurrent_kda_packed_decode(packed[:, :100], x["gate"], x["beta"], x["a_log"], x["dt_bias"], -5.0,
                                               torch.zeros(6, 2, 48, 32), slots)


def test_what_is_not_there():
    x = inputs(1, 3)
    pool, slots = torch.zeros(6, 2, 48, 32), torch.tensor([1, 2, 3], dtype=torch.int32)
    with pytest.raises(NotImplementedError, match="speculation"):
        vllm.fused_recurrent_kda(*(x[n] for n in NAMES), None, pool, torch.arange(4), slots, num_accepted_tokens=slots)
    with pytest.raises(NotImplementedError, match="kda_recoverssm_verify"):
        vllm.kda_recoverssm_verify()
