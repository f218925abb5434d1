# SPDX-License-Identifier: Apache-2.0
"""kilin.kda and kilin.kda_pool on the CPU against the float64 recurrence."""
import pytest
import reference
import torch
from cases import KINDS, TENSORS, inputs

import kilin
from kilin import _ops

# float32 sums over at most some hundred terms
TOLERANCE = 5e-6


def both(x, kind, **more):
    expected = reference.kda(**x, gate_kind=kind, **more)
    got = kilin.kda(**x, gate_kind=KINDS[kind], **more)
    return got, expected


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", [0, 1, 5, 16, 63, 64, 65, 200])
def test_forward(kind, length):
    x = inputs(2, length, gate_kind=kind, state=True, seed=length)
    (out, state, _), (expected, expected_state) = both(x, kind)
    assert out.dtype == torch.float32 and state.dtype == torch.float32
    assert reference.relative_error(out, expected) < TOLERANCE
    assert reference.relative_error(state, expected_state) < TOLERANCE


@pytest.mark.parametrize("form", [_ops.CHUNK, _ops.RECURRENT])
def test_forms_agree(form):
    x = inputs(1, 70)
    expected, expected_state = reference.kda(**x, gate_kind="softplus")
    out, state, _ = kilin.kda(**x, gate_kind=kilin.SOFTPLUS, form=form)
    assert reference.relative_error(out, expected) < TOLERANCE
    assert reference.relative_error(state, expected_state) < TOLERANCE


@pytest.mark.parametrize("integer", [torch.int32, torch.int64])
@pytest.mark.parametrize("offsets", [[0, 70], [0, 0, 1, 64, 64, 129, 150, 150], [0, 0]])
def test_sequences_of_different_lengths(offsets, integer):
    x = inputs(1, offsets[-1], sequences=len(offsets) - 1, state=True, gate_kind="bounded")
    got, expected = both(x, "bounded", cu_seqlens=torch.tensor(offsets, dtype=integer))
    assert reference.relative_error(got[0], expected[0]) < TOLERANCE
    assert reference.relative_error(got[1], expected[1]) < TOLERANCE
    for n, (begin, end) in enumerate(zip(offsets, offsets[1:])):
        if begin == end:  # an empty sequence hands its state on, bit for bit
            assert torch.equal(got[1][n], x["initial_state"][n])


@pytest.mark.parametrize("heads, value_heads, key_dim, value_dim",
                         [(1, 1, 1, 1), (2, 6, 64, 128), (3, 3, 100, 60), (1, 2, 128, 128), (1, 1, 256, 256)])
def test_head_shapes(heads, value_heads, key_dim, value_dim):
    x = inputs(1, 40, heads, value_heads, key_dim, value_dim)
    got, expected = both(x, "softplus")
    assert reference.relative_error(got[0], expected[0]) < TOLERANCE
    assert reference.relative_error(got[1], expected[1]) < TOLERANCE


def test_options():
    x = inputs(2, 33, gate_kind="bounded")
    x.update(l2norm=False, scale=0.3, lower_bound=-2.0, beta_scale=2.0, a_log=None, dt_bias=None)
    x["k"] = x["k"] * 0.1
    got, expected = both(x, "bounded")
    assert reference.relative_error(got[0], expected[0]) < TOLERANCE
    x = inputs(2, 33, gate_kind="none")
    x.update(beta_is_logit=False, beta=x["beta"].sigmoid())
    got, expected = both(x, "none")
    assert reference.relative_error(got[0], expected[0]) < TOLERANCE


@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 4e-3), (torch.float16, 5e-4)])
def test_half_types(dtype, tolerance):
    x = inputs(1, 65, dtype=dtype)
    (out, state, _), (expected, expected_state) = both(x, "softplus")
    assert out.dtype == dtype and state.dtype == torch.float32
    assert reference.relative_error(out, expected) < tolerance
    assert reference.relative_error(state, expected_state) < TOLERANCE


def test_slices_of_a_projection():
    """Strided inputs give the bits of contiguous ones."""
    x = inputs(1, 50, key_dim=32, value_dim=32)
    packed = torch.cat([x[n].flatten(2) for n in ("q", "k", "v", "gate", "beta")], -1)
    parts = packed.split([64, 64, 64, 64, 2], -1)
    strided = dict(x, **{n: p.unflatten(-1, x[n].shape[2:]) for n, p in zip(("q", "k", "v", "gate", "beta"), parts)})
    assert not strided["q"].is_contiguous()
    assert torch.equal(kilin.kda(**strided, gate_kind=0)[0], kilin.kda(**x, gate_kind=0)[0])
    # and what the kernels cannot read in place is copied
    odd = dict(x, q=x["q"].transpose(1, 2).contiguous().transpose(1, 2), beta=x["beta"][..., :1].expand(-1, -1, 2))
    even = dict(x, beta=odd["beta"].contiguous())
    assert torch.equal(kilin.kda(**odd, gate_kind=0)[0], kilin.kda(**even, gate_kind=0)[0])


def test_splitting_a_sequence():
    x = inputs(1, 96)
    whole, state, _ = kilin.kda(**x, gate_kind=0)
    head = {n: t[:, :48] if n in ("q", "k", "v", "gate", "beta") else t for n, t in x.items()}
    tail = {n: t[:, 48:] if n in ("q", "k", "v", "gate", "beta") else t for n, t in x.items()}
    first, between, _ = kilin.kda(**head, gate_kind=0)
    second, end, _ = kilin.kda(**tail, gate_kind=0, initial_state=between)
    assert torch.equal(torch.cat([first, second], 1), whole) and torch.equal(end, state)


def test_chunk_states():
    offsets = torch.tensor([0, 130, 130, 194])
    x = inputs(1, 194, sequences=3, state=True)
    out, state, kept = kilin.kda(**x, gate_kind=0, cu_seqlens=offsets, chunk_states=4)
    plain, plain_state, _ = kilin.kda(**x, gate_kind=0, cu_seqlens=offsets)
    assert torch.equal(out, plain) and torch.equal(state, plain_state)
    assert torch.equal(kept[0], x["initial_state"][0]) and torch.equal(kept[3], x["initial_state"][2])
    head = {n: t[:, :64] if n in ("q", "k", "v", "gate", "beta") else t for n, t in x.items()}
    head["initial_state"] = x["initial_state"][:1]
    assert torch.equal(kilin.kda(**head, gate_kind=0)[1][0], kept[1])
    with pytest.raises(RuntimeError, match="chunk"):
        kilin.kda(**x, gate_kind=0, cu_seqlens=offsets, chunk_states=3)


def test_pool():
    """States in place: named slots as kda() computes them, padding gives zeros, other slots are untouched."""
    offsets = torch.tensor([0, 3, 4, 4, 24])
    slots = torch.tensor([5, -1, 2, 0], dtype=torch.int32)
    x = inputs(1, 24)
    storage = torch.full((7, 2 * 48 * 32 + 10), 1e30)
    pool = storage[:, : 2 * 48 * 32].unflatten(1, (2, 48, 32))
    pool[[5, 2, 0]] = torch.randn(3, 2, 48, 32)
    before = storage.clone()
    start = torch.stack([pool[5], torch.zeros(2, 48, 32), pool[2], pool[0]])
    expected, expected_state, _ = kilin.kda(**x, gate_kind=0, cu_seqlens=offsets, initial_state=start)
    out = kilin.kda_pool(**x, pool=pool, slots=slots, gate_kind=0, cu_seqlens=offsets)
    assert torch.equal(out[:, :3], expected[:, :3]) and torch.equal(out[:, 4:], expected[:, 4:])
    assert not out[:, 3].any() and expected[:, 3].any()
    for slot, n in ((5, 0), (2, 2), (0, 3)):
        assert torch.equal(pool[slot], expected_state[n])
    assert torch.equal(storage[[1, 3, 4, 6]], before[[1, 3, 4, 6]])
    assert torch.equal(storage[:, 2 * 48 * 32:], before[:, 2 * 48 * 32:])
    # without padding nothing is copied, with the same result
    again = before.clone()
    pool = again[:, : 2 * 48 * 32].unflatten(1, (2, 48, 32))
    pool[6] = 0
    kilin.kda_pool(**x, pool=pool, slots=torch.tensor([5, 6, 2, 0], dtype=torch.int32), gate_kind=0,
                   cu_seqlens=offsets)
    for slot, n in ((5, 0), (6, 1), (2, 2), (0, 3)):
        assert torch.equal(pool[slot], expected_state[n])


def test_number_of_threads_does_not_change_bits():
    x = inputs(3, 100, 4)
    results = []
    for threads in (1, 2, 5):
        kilin.set_num_threads(threads)
        results.append(kilin.kda(**x, gate_kind=0)[0])
    kilin.set_num_threads(torch.get_num_threads())
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_after_fork():
    """The pool's threads are the parent's; a child (a data loader's worker, say) makes its own."""
    import multiprocessing

    x = inputs(2, 40)
    expected = kilin.kda(**x, gate_kind=0)[0]
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    child = context.Process(target=lambda: queue.put(torch.equal(kilin.kda(**x, gate_kind=0)[0], expected)))
    child.start()
    child.join(60)
    assert child.exitcode == 0 and queue.get()


def change(**replaced):
    return dict(inputs(2, 8, gate_kind="softplus"), gate_kind=0, **replaced)


@pytest.mark.parametrize("arguments, message", [
    (change(cu_seqlens=torch.tensor([0, 8])), "batch size is 2"),
    (dict(inputs(1, 8), cu_seqlens=torch.tensor([0, 9]), gate_kind=0), "cu_seqlens"),
    (dict(inputs(1, 8), cu_seqlens=torch.tensor([0, 5, 3, 8]), gate_kind=0), "cu_seqlens"),
    (dict(inputs(1, 8), cu_seqlens=torch.tensor([1, 8]), gate_kind=0), "cu_seqlens"),
    (dict(inputs(1, 8), cu_seqlens=torch.tensor([0.0, 8.0]), gate_kind=0), "int32 or int64"),
    (dict(inputs(1, 8), initial_state=torch.zeros(1, 2, 32, 48), gate_kind=0), "initial_state"),
    (dict(inputs(1, 8), gate_kind=3), "gate_kind"),
    (dict(inputs(1, 8), gate_kind=1, lower_bound=1.0), "lower_bound"),
    (dict(inputs(1, 8), gate_kind=0, a_log=torch.zeros(3)), "a_log"),
    (dict(inputs(1, 8), gate_kind=0, dt_bias=torch.zeros(3)), "dt_bias"),
    (dict(inputs(1, 8, key_dim=257), gate_kind=0), "key_dim"),
    (dict(inputs(1, 8, heads=2, value_heads=3), gate_kind=0), "value_heads"),
])
def test_errors(arguments, message):
    with pytest.raises(RuntimeError, match=message):
        kilin.kda(**arguments)


@pytest.mark.parametrize("name", ["k", "v", "gate", "beta"])
def test_wrong_shapes(name):
    x = inputs(1, 8)
    x[name] = x[name][:, :7]
    with pytest.raises(RuntimeError, match=name):
        kilin.kda(**x, gate_kind=0)


def test_refused_types_and_devices():
    x = inputs(1, 8)
    with pytest.raises(TypeError, match="float64"):
        kilin.kda(**dict(x, q=x["q"].double()), gate_kind=0)
    with pytest.raises(RuntimeError, match="slots"):
        kilin.kda_pool(**x, gate_kind=0, pool=torch.zeros(2, 2, 48, 32), slots=torch.tensor([2], dtype=torch.int32))
    with pytest.raises(NotImplementedError, match="speculation"):
        kilin.kda_pool(**x, gate_kind=0, pool=torch.zeros(2, 2, 48, 32), slots=torch.zeros(1, 2, dtype=torch.int32))
    with pytest.raises(RuntimeError, match="two sequences"):
        kilin.kda_pool(**x, gate_kind=0, pool=torch.zeros(2, 2, 48, 32), slots=torch.tensor([1, 1], dtype=torch.int32),
                       cu_seqlens=torch.tensor([0, 4, 8]))


def test_cuda_tensors_on_a_cpu_build():
    if kilin.built_with_cuda():
        pytest.skip("this build has CUDA kernels")
    from kilin._library import require_device

    class FakeCuda:
        device = torch.device("cuda")

    with pytest.raises(NotImplementedError, match="CPU kernels only"):
        require_device(FakeCuda())


def test_tensor_names_are_complete():
    assert set(TENSORS) >= {n for n, t in inputs(1, 1, state=True).items() if isinstance(t, torch.Tensor)}
