# SPDX-License-Identifier: Apache-2.0
"""Gradients on the CPU against autograd through the float64 recurrence, opcheck, torch.compile."""
import pytest
import reference
import torch
from cases import KINDS, TENSORS, inputs

import kilin

TOLERANCE = 2e-5


def gradients(function, x, weights, kind, **more):
    leaves = {n: t.detach().clone().requires_grad_() for n, t in x.items() if n in TENSORS and t is not None}
    result = function(**dict(x, **leaves), gate_kind=kind, **more)
    loss = sum((w * r.double()).sum() for w, r in zip(weights, result) if w is not None)
    names = list(leaves)
    return dict(zip(names, torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)))


def compare(x, kind, with_state=True, with_out=True, tolerance=TOLERANCE, **more):
    generator = torch.Generator().manual_seed(7)
    out, state = reference.kda(**x, gate_kind=kind, **more)
    weights = [torch.randn(t.shape, generator=generator, dtype=torch.float64) if wanted else None
               for t, wanted in ((out, with_out), (state, with_state))]
    expected = gradients(reference.kda, x, weights, kind, **more)
    got = gradients(kilin.kda, x, weights, KINDS[kind], **more)
    for name, gradient in expected.items():
        if gradient is None:
            assert got[name] is None or not got[name].any(), name
            continue
        assert got[name] is not None and got[name].dtype == x[name].dtype, name
        error = reference.relative_error(got[name], gradient)
        assert error < tolerance, f"d{name}: {error}"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", [1, 17, 64, 65])
def test_gradients(kind, length):
    compare(inputs(2, length, gate_kind=kind, state=True, seed=length), kind)


@pytest.mark.parametrize("with_out, with_state", [(True, False), (False, True)])
def test_gradient_of_one_result(with_out, with_state):
    compare(inputs(1, 20, gate_kind="bounded"), "bounded", with_out=with_out, with_state=with_state)


def test_gradients_of_several_sequences_and_grouped_heads():
    x = inputs(1, 90, heads=2, value_heads=4, sequences=4, state=True)
    compare(x, "softplus", cu_seqlens=torch.tensor([0, 30, 30, 31, 90]))


def test_gradients_through_other_options():
    x = inputs(2, 20, gate_kind="none")
    x.update(beta_is_logit=False, beta=x["beta"].sigmoid(), l2norm=False, k=x["k"] * 0.1, scale=0.2)
    compare(x, "none")
    compare(dict(inputs(1, 20), beta_scale=2.0), "softplus")


def test_gradients_of_bfloat16():
    compare(inputs(1, 40, dtype=torch.bfloat16), "softplus", tolerance=6e-3)


def test_no_tokens():
    x = inputs(1, 0, state=True)
    leaf = x["initial_state"].requires_grad_()
    _, state, _ = kilin.kda(**x, gate_kind=0)
    state.sum().backward()
    assert torch.equal(leaf.grad, torch.ones_like(leaf))


def operator_arguments(state=True, offsets=None):
    x = inputs(1, 20, key_dim=8, value_dim=8, state=state, sequences=None if offsets is None else len(offsets) - 1)
    tensors = [x["q"], x["k"], x["v"], x["gate"], x["beta"], x["a_log"], x["dt_bias"], x.get("initial_state")]
    for tensor in tensors:
        if tensor is not None:
            tensor.requires_grad_()
    cu_seqlens = None if offsets is None else torch.tensor(offsets)
    return tensors, cu_seqlens, (0.5, 0, -5.0, True, True, 1.0)


@pytest.mark.parametrize("offsets", [None, [0, 5, 20]])
@pytest.mark.parametrize("state", [True, False])
def test_opcheck_forward(state, offsets):
    tensors, cu_seqlens, options = operator_arguments(state, offsets)
    torch.library.opcheck(torch.ops.kilin.kda.default, (*tensors, cu_seqlens, *options, 0, True, 0))


def test_opcheck_backward_and_pool():
    tensors, cu_seqlens, options = operator_arguments()
    tensors = [t.detach() for t in tensors]
    torch.library.opcheck(torch.ops.kilin.kda_backward.default,
                          (*tensors, cu_seqlens, *options, torch.randn(1, 20, 2, 8), torch.randn(1, 2, 8, 8)))
    torch.library.opcheck(torch.ops.kilin.kda_pool.default,
                          (*tensors[:7], torch.randn(3, 2, 8, 8), torch.tensor([1], dtype=torch.int32), None, cu_seqlens,
                           *options, 0, 0))


def test_compile_whole_graph():
    """One graph, same numbers, gradients too (the backend runs the graph as traced: no C++ compiler needed)."""
    x = inputs(1, 20, key_dim=16, value_dim=16)
    leaf = x.pop("q")

    def function(q):
        out, state, _ = kilin.kda(q * 2.0, **x, gate_kind=kilin.SOFTPLUS)
        return out.sin().sum() + state.sum()

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    results = []
    for f in (function, compiled):
        q = leaf.clone().requires_grad_()
        value = f(q)
        value.backward()
        results.append((value.detach(), q.grad))
    assert torch.allclose(results[0][0], results[1][0], rtol=1e-6)
    assert torch.allclose(results[0][1], results[1][1], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_of_an_earlier_call_is_left(kind):
    """NaN in one call's inputs, and with them in the scratch memory, must not reach the next call's padding."""
    bad = inputs(1, 300, heads=4, key_dim=256, value_dim=256, gate_kind=kind, state=True)
    bad = {n: torch.full_like(t, float("nan")) if isinstance(t, torch.Tensor) else t for n, t in bad.items()}
    leaf = bad["q"].requires_grad_()
    torch.autograd.grad(kilin.kda(**bad, gate_kind=KINDS[kind])[0].sum(), leaf)
    for size in (20, 100):
        compare(inputs(1, 100, heads=4, key_dim=size, value_dim=size, gate_kind=kind, state=True), kind)
