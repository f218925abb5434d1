#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Which rounding of the chunk kernel for Hopper costs what: its algorithm in float64 on the CPU, with bf16 where the
kernel rounds, beside the recurrence (kda_gpu_reference.py), on the accuracy cases of kda_gpu.py that have one sequence.

    python3 bench/kda_rounding.py [PART_OF_A_CASE'S_NAME...]

Columns: RMS of the difference over RMS of the result, of o and of the final state. The inputs are those of kda_gpu.py
but for the random numbers, which a CPU draws differently. Schemes (k = f k^, k^ a key times a power of two):
    beta in A     A diag(beta) rounded, normalised keys rounded: the kernel until 2026-11-25
    beta in keys  A with ones on the diagonal, beta k rounded
    A in two      as the first, A diag(beta) in two bf16 terms
    c in R        A with ones on the diagonal, k^ rounded, c = beta f multiplied in float32, diag(c) A diag(f) in one term
    kernel        the same with diag(c) A diag(f) in two terms, for w: the kernel now
"""
import sys

import torch

import kda_gpu_reference as reference

CHUNK = 16
SCHEMES = ("beta in A", "beta in keys", "A in two", "c in R", "kernel")


def bf16(x):
    return x.float().bfloat16().double()


def two_terms(x):
    return bf16(x) + bf16(x - bf16(x))


def pairs(rows, columns, decay, gentle):
    """sum_c rows_ic columns_jc e^(decay_ic - decay_jc) for i >= j from operands in bf16, as kda_image_sm90.cuh splits
    them: relative to the chunk's start, or to the fifth token of the columns' half."""
    n = rows.shape[1]
    result = torch.zeros(rows.shape[0], n, n, dtype=torch.float64)
    for start in range(0, n, 8):
        half = slice(start, min(start + 8, n))
        anchor = torch.zeros_like(decay[:, :1]) if gentle else decay[:, min(start + 4, n - 1)][:, None]
        left = bf16(rows * (decay - anchor).clamp(max=80).exp())
        right = bf16(columns[:, half] * (anchor - decay[:, half]).clamp(max=80).exp())
        result[:, :, half] = left @ right.transpose(1, 2)
    return result


def chunk(state, q, k, raw, v, decay, beta, scheme):
    """(o, state) of one chunk, all heads: q, k, raw [H, n, K] (k normalised, raw not), v [H, n, V], decay (cumulative),
    beta [H, n], state [H, V, K]."""
    n = q.shape[1]
    norm = (k * raw).sum(-1) / raw.square().sum(-1)
    power = norm.log2().floor().exp2()
    f, hat = norm / power, raw * power[..., None]
    keys = {"beta in A": k, "beta in keys": k * beta[..., None], "A in two": k}.get(scheme, hat)
    rows = hat if scheme in ("c in R", "kernel") else k
    gentle = decay.min() > -72
    inner = pairs(rows, keys, decay, gentle).tril(-1)
    p = pairs(q, keys, decay, gentle).tril()
    one = torch.eye(n, dtype=torch.float64)
    factor = torch.ones_like(beta)
    if scheme in ("beta in A", "A in two"):
        a = torch.linalg.inv(one + beta[..., None] * inner) * beta[:, None, :]
        a = of_w = two_terms(a) if scheme == "A in two" else bf16(a)
    elif scheme == "beta in keys":
        a = of_w = bf16(torch.linalg.inv(one + inner))
    else:
        factor = beta * f
        a = torch.linalg.inv(one + f[..., None] * inner * factor[:, None, :])
        of_w = factor[..., None] * a * f[:, None, :]
        a, of_w = bf16(a), two_terms(of_w) if scheme == "kernel" else bf16(of_w)
    w = bf16(of_w @ bf16(rows * decay.exp()))
    end = decay[:, -1:]
    rounded = bf16(state)
    r = bf16((v.transpose(1, 2) @ a.transpose(1, 2)) * factor[:, None, :] - rounded @ w.transpose(1, 2))
    o = rounded @ bf16(q * decay.exp()).transpose(1, 2) + r @ bf16(p).transpose(1, 2)
    return bf16(o), (state * end.exp() + r @ bf16(keys * (end - decay).exp())).float().double()


def forward(x, scheme):
    q, k, v, g, beta = (t[0].transpose(0, 1) for t in reference.transforms(x))
    groups = v.shape[0] // q.shape[0]
    q, k, raw = (t.repeat_interleave(groups, 0) for t in (q, k, x.k[0].double().transpose(0, 1)))
    g = g.clamp_min(-24 * 0.6931471805599453)
    state = torch.zeros(v.shape[0], v.shape[2], k.shape[2], dtype=torch.float64)
    if x.initial_state is not None:
        state = x.initial_state[0].double()
    outputs = []
    for start in range(0, q.shape[1], CHUNK):
        part = slice(start, start + CHUNK)
        o, state = chunk(state, q[:, part], k[:, part], raw[:, part], v[:, part], g[:, part].cumsum(1), beta[:, part],
                         scheme)
        outputs.append(o.transpose(1, 2))
    return torch.cat(outputs, 1).transpose(0, 1)[None], state[None]


def main():
    torch.manual_seed(0)
    print(f"{'':30s} " + " ".join(f"{scheme:>17s}" for scheme in SCHEMES))
    for name, x in reference.accuracy_cases(device="cpu"):
        if x.cu_seqlens is not None or (sys.argv[1:] and not any(part in name for part in sys.argv[1:])):
            continue
        expected = reference.recurrence(x)
        errors = [[reference.errors(got, want)[0] for got, want in zip(forward(x, scheme), expected)] for scheme in SCHEMES]
        print(f"{name:30s} " + " ".join(f"{o:8.2e} {state:8.2e}" for o, state in errors), flush=True)


if __name__ == "__main__":
    main()
