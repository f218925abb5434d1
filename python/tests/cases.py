# SPDX-License-Identifier: Apache-2.0
"""Random inputs of the tests."""
import torch


def inputs(batch, length, heads=2, value_heads=None, key_dim=32, value_dim=48, gate_kind="softplus", sequences=None,
           dtype=torch.float32, seed=0, state=False):
    """Keyword arguments of kilin.kda and reference.kda, but for the kind of the gate."""
    generator = torch.Generator().manual_seed(seed)
    value_heads = value_heads or heads

    def normal(*shape, kind=dtype):
        return torch.randn(*shape, generator=generator).to(kind)

    gate = normal(batch, length, value_heads, key_dim)
    if gate_kind == "none":
        gate = (-gate.float().abs()).to(dtype)
    result = dict(q=normal(batch, length, heads, key_dim), k=normal(batch, length, heads, key_dim),
                  v=normal(batch, length, value_heads, value_dim), gate=gate,
                  beta=normal(batch, length, value_heads), l2norm=True, beta_is_logit=True)
    if gate_kind != "none":
        result.update(a_log=normal(value_heads, kind=torch.float32) * 0.5,
                      dt_bias=normal(value_heads * key_dim, kind=torch.float32) - 2.0)
    if state:
        result["initial_state"] = normal(sequences or batch, value_heads, value_dim, key_dim, kind=torch.float32)
    return result


TENSORS = ("q", "k", "v", "gate", "beta", "a_log", "dt_bias", "initial_state")
KINDS = {"softplus": 0, "bounded": 1, "none": 2}
