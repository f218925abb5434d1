# SPDX-License-Identifier: Apache-2.0
"""kilin.fla: FLA's arguments, layouts and refusals."""
import inspect

import pytest
import reference
import torch
from cases import inputs

from kilin import fla

TOLERANCE = 5e-6


def arguments(x):
    """FLA's names for cases.inputs."""
    return dict(q=x["q"], k=x["k"], v=x["v"], g=x["gate"], beta=x["beta"], A_log=x.get("a_log"),
                dt_bias=x.get("dt_bias"), use_qk_l2norm_in_kernel=True, use_gate_in_kernel=True,
                use_beta_sigmoid_in_kernel=True)


@pytest.mark.parametrize("function", [fla.chunk_kda, fla.fused_recurrent_kda])
@pytest.mark.parametrize("v_first", [False, True])
def test_layouts(function, v_first):
    x = inputs(2, 37, heads=2, value_heads=4, state=True)
    expected, expected_state = reference.kda(**x, gate_kind="softplus")
    start = x["initial_state"] if v_first else x["initial_state"].transpose(-1, -2).contiguous()
    o, state = function(**arguments(x), initial_state=start, output_final_state=True, state_v_first=v_first)
    assert reference.relative_error(o, expected) < TOLERANCE
    assert reference.relative_error(state if v_first else state.transpose(-1, -2), expected_state) < TOLERANCE
    assert state.is_contiguous()
    assert function(**arguments(x))[1] is None
    with pytest.warns(DeprecationWarning):
        old = function(**arguments(x), initial_state=start, output_final_state=True, transpose_state_layout=v_first)
    assert torch.equal(old[1], state)


@pytest.mark.parametrize("function", [fla.chunk_kda, fla.fused_recurrent_kda])
def test_plain_defaults(function):
    """Without flags g is the log decay and beta is beta."""
    x = inputs(1, 30, gate_kind="none")
    x.update(l2norm=False, beta_is_logit=False, beta=x["beta"].sigmoid(), k=x["k"] * 0.1)
    expected, _ = reference.kda(**x, gate_kind="none")
    o, _ = function(x["q"], x["k"], x["v"], x["gate"], x["beta"])
    assert reference.relative_error(o, expected) < TOLERANCE


@pytest.mark.parametrize("function", [fla.chunk_kda, fla.fused_recurrent_kda])
def test_bounded_gate_and_negative_eigenvalues(function):
    x = inputs(1, 30)
    expected, _ = reference.kda(**x, gate_kind="bounded", lower_bound=-3.0, beta_scale=2.0)
    o, _ = function(**arguments(x), lower_bound=-3.0, allow_neg_eigval=True)
    assert reference.relative_error(o, expected) < TOLERANCE
    expected, _ = reference.kda(**dict(x, a_log=None, dt_bias=None), gate_kind="bounded")
    o, _ = function(**dict(arguments(x), A_log=None, dt_bias=None), lower_bound=-5.0)
    assert reference.relative_error(o, expected) < TOLERANCE


def test_sequences_and_intermediate_states():
    offsets = torch.tensor([0, 100, 100, 180])
    x = inputs(1, 180, sequences=3, state=True)
    start = x["initial_state"].transpose(-1, -2).contiguous()
    expected, _ = reference.kda(**x, gate_kind="softplus", cu_seqlens=offsets)
    with torch.inference_mode():
        o, state, h = fla.chunk_kda(**arguments(x), initial_state=start, output_final_state=True, cu_seqlens=offsets,
                                    return_intermediate_states=True)
    assert reference.relative_error(o, expected) < TOLERANCE
    assert h.shape == (1, 4, 2, 32, 48) and torch.equal(h[0, 0], start[0]) and torch.equal(h[0, 2], start[2])
    with torch.inference_mode():
        h = fla.chunk_kda(**arguments(inputs(3, 65)), return_intermediate_states=True)[2]
    assert h.shape == (3, 2, 2, 32, 48) and not h[:, 0].any() and h[:, 1].any()


def test_gradients_reach_every_argument():
    x = inputs(1, 20, state=True)
    named = arguments(x)
    start = x["initial_state"].transpose(-1, -2).contiguous().requires_grad_()
    leaves = [named[n].requires_grad_() for n in ("q", "k", "v", "g", "beta", "A_log", "dt_bias")]
    o, state = fla.chunk_kda(**named, initial_state=start, output_final_state=True)
    gradients = torch.autograd.grad(o.sum() + state.sin().sum(), [*leaves, start])
    doubles = {n: x[n].detach().double().requires_grad_()
               for n in ("q", "k", "v", "gate", "beta", "a_log", "dt_bias", "initial_state")}
    o, state = reference.kda(**doubles, gate_kind="softplus", l2norm=True, beta_is_logit=True)
    expected = list(torch.autograd.grad(o.sum() + state.sin().sum(), list(doubles.values())))
    expected[-1] = expected[-1].transpose(-1, -2)
    for got, want in zip(gradients, expected):
        assert reference.relative_error(got, want) < 2e-5


@pytest.mark.parametrize("v_first", [False, True])
def test_pool_decode(v_first):
    x = inputs(1, 3)
    pool = torch.randn(5, 2, 48, 32) if v_first else torch.randn(5, 2, 32, 48)
    turned = pool if v_first else pool.transpose(-1, -2)
    start = turned.clone()
    indices = torch.tensor([4, 0, 2], dtype=torch.int32)
    offsets = torch.arange(4)
    out = torch.empty_like(x["v"])
    o, state = fla.fused_recurrent_kda_fwd(**arguments(x), initial_state=pool, ssm_state_indices=indices,
                                           state_v_first=v_first, cu_seqlens=offsets, out=out)
    expected, expected_state = reference.kda(**x, gate_kind="softplus", cu_seqlens=offsets,
                                             initial_state=start[indices.long()])
    assert o is out and state is pool
    assert reference.relative_error(o, expected) < TOLERANCE
    assert reference.relative_error(turned[indices.long()], expected_state) < TOLERANCE
    assert torch.equal(turned[[1, 3]], start[[1, 3]])


def test_gate():
    x = inputs(1, 10)
    g, a_log, dt_bias = x["gate"], x["a_log"], x["dt_bias"]
    double = (g.double() + dt_bias.double().view(2, 32), a_log.double().exp().view(2, 1))
    assert reference.relative_error(fla.fused_kda_gate(g, a_log, dt_bias),
                                    -double[1] * torch.log1p(double[0].exp())) < 1e-6
    assert reference.relative_error(fla.fused_kda_gate(g, a_log, dt_bias, lower_bound=-4.0),
                                    -4 * torch.sigmoid(double[1] * double[0])) < 1e-6
    assert fla.fused_kda_gate(g, lower_bound=-4.0, output_dtype=torch.bfloat16).dtype == torch.bfloat16
    with pytest.raises(ValueError, match="A_log"):
        fla.fused_kda_gate(g)


@pytest.mark.parametrize("change, error, message", [
    (dict(chunk_size=16), ValueError, r"`chunk_size` must be either 32 or 64"),
    (dict(cp_context=object()), NotImplementedError, "cp_context"),
    (dict(nonsense=1), TypeError, "nonsense"),
    (dict(safe_gate=True), ValueError, "lower_bound"),
    (dict(safe_gate=True, lower_bound=-6.0), ValueError, "lower_bound"),
    (dict(A_log=None), ValueError, "A_log"),
    (dict(allow_neg_eigval=True, use_beta_sigmoid_in_kernel=False), ValueError, "allow_neg_eigval"),
    (dict(return_intermediate_states=True), ValueError, "inference mode"),
    (dict(initial_state=torch.zeros(1, 2, 32, 48, dtype=torch.bfloat16)), ValueError, "float32"),
    (dict(initial_state=torch.zeros(2, 2, 32, 48)), ValueError, "initial_state"),
    (dict(initial_state=torch.zeros(1, 2, 48, 32)), ValueError, "initial_state"),
    (dict(cu_seqlens=torch.tensor([0, 4, 8]), initial_state=torch.zeros(1, 2, 32, 48)), ValueError, "initial states"),
    (dict(beta=torch.zeros(1, 8, 2, 48)), ValueError, "beta"),
    (dict(g=torch.zeros(1, 8, 2, 31)), ValueError, "g must have shape"),
])
def test_refusals(change, error, message):
    with pytest.raises(error, match=message):
        fla.chunk_kda(**{**arguments(inputs(1, 8)), **change})


def test_refusals_of_the_pool():
    common = dict(arguments(inputs(1, 3)), initial_state=torch.zeros(5, 2, 48, 32), cu_seqlens=torch.arange(4))
    indices = torch.tensor([4, 0, 2], dtype=torch.int32)
    for change in (dict(ssm_state_indices=indices, inplace_final_state=False), dict(ssm_state_indices=indices[:, None]),
                   dict(ssm_state_indices=indices, num_accepted_tokens=indices)):
        with pytest.raises(NotImplementedError):
            fla.fused_recurrent_kda_fwd(**common, **change)


def test_signatures():
    """The names and order of FLA's positional arguments (fla 0.5.2)."""
    chunk = ("q k v g beta scale initial_state output_final_state use_qk_l2norm_in_kernel use_gate_in_kernel "
             "use_beta_sigmoid_in_kernel allow_neg_eigval safe_gate lower_bound disable_recompute "
             "return_intermediate_states state_v_first cu_seqlens cu_seqlens_cpu cp_context").split()
    recurrent = ("q k v g beta A_log dt_bias scale initial_state output_final_state use_qk_l2norm_in_kernel "
                 "use_gate_in_kernel use_beta_sigmoid_in_kernel allow_neg_eigval lower_bound state_v_first "
                 "cu_seqlens").split()
    for function, names in ((fla.chunk_kda, chunk), (fla.fused_recurrent_kda, recurrent)):
        positional = [n for n, p in inspect.signature(function).parameters.items()
                      if p.kind is p.POSITIONAL_OR_KEYWORD]
        assert positional == names
