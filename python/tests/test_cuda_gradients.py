# SPDX-License-Identifier: Apache-2.0
"""Gradients on a GPU against autograd through the float64 recurrence on the CPU. Skipped without a Hopper GPU or CUDA
kernels."""
import pytest
import reference
import torch
from cases import KINDS, TENSORS, inputs

import kilin
from kilin import _ops, fla

pytestmark = pytest.mark.skipif(not kilin.cuda_available(), reason="no Hopper GPU, or no CUDA kernels in this build")

# Those of FLA's tests (norm of the difference over the norm), for bfloat16.
TOLERANCE = dict(q=8e-3, k=8e-3, v=8e-3, gate=2e-2, beta=2e-2, a_log=2e-2, dt_bias=2e-2, initial_state=8e-3)


def case(batch, length, dim=64, **more):
    more = dict(dict(heads=2, key_dim=dim, value_dim=dim, dtype=torch.bfloat16), **more)
    return inputs(batch, length, **more)


def gradients(function, x, weights, device, **more):
    x = {n: t.detach().to(device) if isinstance(t, torch.Tensor) else t for n, t in x.items()}
    more = {n: t.to(device) if isinstance(t, torch.Tensor) else t for n, t in more.items()}
    leaves = {n: t.requires_grad_() for n, t in x.items() if n in TENSORS and t is not None}
    result = function(**x, **more)[:2]
    loss = sum((w.to(device) * r.double()).sum() for w, r in zip(weights, result) if w is not None)
    grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    return dict(zip(leaves, grads))


def weights_for(x, kind, with_out=True, with_state=True, **more):
    """Upstream gradients; that of out is exact in x's type, as autograd rounds it to that."""
    generator = torch.Generator().manual_seed(7)
    out, state = reference.kda(**x, gate_kind=kind, **more)
    return [torch.randn(t.shape, generator=generator).to(x["q"].dtype).double() if wanted else None
            for t, wanted in ((out, with_out), (state, with_state))]


def same(got, expected, x, tolerance=TOLERANCE):
    for name, gradient in expected.items():
        if gradient is None:
            assert got[name] is None or not got[name].any(), name
            continue
        assert got[name].dtype == x[name].dtype and got[name].is_cuda, name
        error = reference.relative_error(got[name].cpu(), gradient)
        assert error < tolerance[name], f"d{name}: {error}"


def compare(x, kind, with_out=True, with_state=True, form=_ops.BY_LENGTH, **more):
    weights = weights_for(x, kind, with_out, with_state, **more)
    expected = gradients(reference.kda, x, weights, "cpu", gate_kind=kind, **more)
    same(gradients(kilin.kda, x, weights, "cuda", gate_kind=KINDS[kind], form=form, **more), expected, x)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length, dim", [(1, 64), (63, 128), (64, 64), (65, 128), (200, 128)])
def test_gradients(kind, length, dim):
    compare(case(2, length, dim, gate_kind=kind, state=True, seed=length), kind)


@pytest.mark.parametrize("with_out, with_state", [(True, False), (False, True)])
def test_gradient_of_one_result(with_out, with_state):
    compare(case(1, 70, gate_kind="bounded", state=True), "bounded", with_out=with_out, with_state=with_state)
    compare(case(1, 70, gate_kind="bounded"), "bounded", with_out=with_out, with_state=with_state)


@pytest.mark.parametrize("integer", [torch.int32, torch.int64])
def test_sequences_and_grouped_heads(integer):
    offsets = torch.tensor([0, 0, 1, 64, 64, 150, 203, 203], dtype=integer)
    compare(case(1, 203, 128, value_heads=4, sequences=7, state=True), "softplus", cu_seqlens=offsets)


def test_through_the_recurrent_form():
    compare(case(1, 70, 128, state=True), "softplus", form=_ops.RECURRENT)


def test_beta_up_to_two_and_plain_arguments():
    compare(dict(case(1, 100), beta_scale=2.0), "bounded")
    x = case(2, 90, gate_kind="none")
    x.update(beta_is_logit=False, beta=x["beta"].sigmoid(), l2norm=False, k=x["k"] * 0.1, scale=0.2)
    compare(x, "none")
    compare(dict(x, beta_scale=1.5), "none")
    x = case(1, 50, gate_kind="bounded")
    x.update(a_log=None, dt_bias=None)
    compare(x, "bounded")


def test_float16_and_float32_gate():
    x = case(1, 130, 128, dtype=torch.float16)
    x.update(gate=x["gate"].float(), beta=x["beta"].float())
    compare(x, "softplus")


def test_slices_of_a_projection():
    x = case(1, 50)
    names = ("q", "k", "v", "gate", "beta")
    weights = weights_for(x, "softplus")
    plain = gradients(kilin.kda, x, weights, "cuda", gate_kind=0)
    packed = torch.cat([x[n].flatten(2) for n in names], -1).cuda()
    packed = torch.nn.functional.pad(packed, (0, 6)).requires_grad_()
    parts = packed[..., :-6].split([128, 128, 128, 128, 2], -1)
    y = {n: t.cuda() if isinstance(t, torch.Tensor) else t for n, t in x.items()}
    y.update({n: p.unflatten(-1, x[n].shape[2:]) for n, p in zip(names, parts)})
    out, state, _ = kilin.kda(**y, gate_kind=0)
    gradient, = torch.autograd.grad(sum((w.cuda() * r.double()).sum() for w, r in zip(weights, (out, state))), packed)
    assert torch.equal(gradient[..., :-6], torch.cat([plain[n].flatten(2) for n in names], -1))


@pytest.mark.parametrize("key_dim, value_dim", [(60, 60), (100, 100), (64, 128), (128, 64), (32, 100)])
@pytest.mark.parametrize("function", [fla.chunk_kda, fla.fused_recurrent_kda])
def test_other_head_sizes_as_fla_has_them(function, key_dim, value_dim):
    x = case(1, 100, key_dim=key_dim, value_dim=value_dim, state=True)
    weights = weights_for(dict(x, beta_scale=2.0), "softplus")

    def call(q, k, v, gate, beta, a_log, dt_bias, initial_state, **_):
        o, state = function(q, k, v, gate, beta, A_log=a_log, dt_bias=dt_bias,
                            initial_state=initial_state.transpose(-1, -2), output_final_state=True,
                            use_qk_l2norm_in_kernel=True, use_gate_in_kernel=True, use_beta_sigmoid_in_kernel=True,
                            allow_neg_eigval=True)
        return o, state.transpose(-1, -2)

    expected = gradients(reference.kda, dict(x, beta_scale=2.0), weights, "cpu", gate_kind="softplus")
    same(gradients(call, x, weights, "cuda"), expected, x)


def test_own_signature_with_other_value_dimension():
    compare(case(1, 70, key_dim=64, value_dim=128, state=True), "softplus")


def test_no_tokens():
    x = {n: t.cuda() if isinstance(t, torch.Tensor) else t for n, t in case(1, 0, state=True).items()}
    leaf = x["initial_state"].requires_grad_()
    _, state, _ = kilin.kda(**x, gate_kind=0)
    state.sum().backward()
    assert torch.equal(leaf.grad, torch.ones_like(leaf))


def test_total_forgetting():
    """Log decays of -1000 here and there: nothing becomes NaN, and what lies before has no gradient from behind."""
    x = case(1, 200, 128, gate_kind="none")
    mask = torch.rand(x["gate"].shape, generator=torch.Generator().manual_seed(3))
    x["gate"] = torch.where(mask < 0.1, -1000.0, -0.1 * mask).to(torch.bfloat16)
    compare(x, "none")


def test_same_bits_every_time():
    x = case(1, 300, 128, state=True)
    weights = weights_for(x, "softplus")
    first = gradients(kilin.kda, x, weights, "cuda", gate_kind=0)
    for _ in range(20):
        again = gradients(kilin.kda, x, weights, "cuda", gate_kind=0)
        assert all(torch.equal(first[n], again[n]) for n in first)


def test_opcheck():
    x = {n: t.cuda() if isinstance(t, torch.Tensor) else t for n, t in case(1, 70, state=True).items()}
    tensors = [x[n] for n in TENSORS]
    options = (0.1, 0, -5.0, True, True, 1.0)
    torch.library.opcheck(torch.ops.kilin.kda_backward.default,
                          (*tensors, None, *options, torch.randn_like(x["v"]), torch.randn(1, 2, 64, 64, device="cuda")),
                          test_utils=("test_schema", "test_faketensor"))
    leaves = [t.detach().requires_grad_() for t in tensors]
    torch.library.opcheck(torch.ops.kilin.kda.default, (*leaves, None, *options, 0, True, 0),
                          test_utils=("test_schema", "test_faketensor", "test_autograd_registration",
                                      "test_aot_dispatch_dynamic"), atol=1e-2, rtol=1e-2)


def test_compile_whole_graph():
    x = {n: t.cuda() if isinstance(t, torch.Tensor) else t for n, t in case(1, 70).items()}
    leaf = x.pop("q")

    def function(q):
        out, state, _ = kilin.kda(q * 2.0, **x, gate_kind=kilin.SOFTPLUS)
        return out.float().sin().sum() + state.sum()

    results = []
    for f in (function, torch.compile(function, fullgraph=True, backend="aot_eager")):
        q = leaf.clone().requires_grad_()
        value = f(q)
        value.backward()
        results.append((value.detach(), q.grad))
    assert torch.allclose(results[0][0], results[1][0], rtol=1e-4)
    assert torch.allclose(results[0][1].float(), results[1][1].float(), rtol=1e-2, atol=1e-4)
