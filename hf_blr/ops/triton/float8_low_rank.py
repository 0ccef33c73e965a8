"""Low-rank in float8: two products, of which cuBLAS does the second best; of several layers on one input one first."""

from __future__ import annotations

import torch

from hf_blr.ops.rules.device import device_of
from hf_blr.ops.rules.float8 import multiplies_by_cublas
from hf_blr.ops.triton.float8_gemm import EmittedScales, float8_gemm, in_lines, peak_of_codes
from hf_blr.ops.triton.grouped import columns, joined, ranks, split


def forward(x, x_scale, tensors, scales, bias, dtype, activation):
    """x `[T, K]` float8 with x_scale `[T]` -> `[T, N]` in dtype.

    tensors (u `[N, R]`, v `[R, K]`) float8, with scales `[.., 1]`.
    """
    (u, v), (u_scale, v_scale) = tensors, scales
    peak = peak_of_codes(v.shape[1], v_scale.view(1, 1, -1))
    return both_stages(x, x_scale, u, u_scale, v, v_scale, peak, None, bias, dtype, activation)


def both_stages(x, x_scale, u, u_scale, v, v_scale, peak, pivots, bias, dtype, activation):
    """`[T, N]` in dtype of x `[T, P]` and v `[R, P]`, the pivots `[T, R]` added to what they make, if there are any."""
    tokens, (n, r) = x.shape[0], u.shape
    if tokens == 0:
        return x.new_empty(0, n, dtype=dtype)
    y = in_lines(x, tokens, r)
    if multiplies_by_cublas(tokens, n, dtype == torch.bfloat16, bool(activation), device_of(x)):
        rows, columns = x_scale.new_empty(tokens, 1), x_scale.new_empty(1, n)
        emitted = EmittedScales(x_scale, u_scale, rows, columns)
        float8_gemm(x[None], v[None], y[None, None], v_scale[None], peak, pivots=pivots, emitted=emitted)
        return torch._scaled_mm(y, u.T, rows, columns, bias, out_dtype=dtype, use_fast_accum=True)
    out = x.new_empty(tokens, n, dtype=dtype)
    float8_gemm(x[None], v[None], y[None, None], v_scale[None], peak, pivots=pivots)
    float8_gemm(y[None], u[None], out[None, None], u_scale[None], peak, x_scale, bias=bias, activation=activation)
    return out


def grouped(x, x_scale, us, vs, u_scales, v_scales, biases, dtype):
    """`[T, sum of N]` in dtype of x `[T, K]`; each layer as in `forward`, with its bias or None.

    Layers whose v lie side by side have one first stage, and one bound for the y of all. Those of one size have one
    last stage too, except for the widest, which cuBLAS multiplies one by one where it pays.
    """
    us, vs, u_scales, v_scales = ([t[None] for t in tensors] for tensors in (us, vs, u_scales, v_scales))
    tokens = x.shape[0]
    out = x.new_empty(tokens, sum(u.shape[1] for u in us), dtype=dtype)
    if tokens == 0:
        return out
    for part in split(range(len(vs)), (vs, 1), (v_scales, 1)):
        v, v_scale = joined(vs, part, 1), joined(v_scales, part, 1)
        y, peak = in_lines(x, 1, tokens, v.shape[1]), peak_of_codes(v.shape[2], v_scale.view(1, 1, -1))
        runs = split(part, (us, 0), (u_scales, 0), (biases, 0))
        widest = max(runs, key=lambda run: us[run.start].shape[1])
        n = us[widest.start].shape[1]
        emitted = None
        if multiplies_by_cublas(tokens, n, dtype == torch.bfloat16, False, device_of(x)):
            last_scale = joined(u_scales, widest, 0)
            rows, scales = x_scale.new_empty(tokens, 1), x_scale.new_empty(len(widest), 1, n)
            emitted = EmittedScales(x_scale, last_scale, rows, scales)
        float8_gemm(x[None], v, y[:, None], v_scale, peak, emitted=emitted)
        for run in runs:
            count, (_, n, r) = len(run), us[run.start].shape
            z = ranks(y, vs, part, run).view(tokens, count, r).transpose(0, 1)
            u, bias = joined(us, run, 0), joined(biases, run, 0)
            o = columns(out, us, run).view(tokens, count, n).transpose(0, 1)
            if emitted is None or run != widest:
                float8_gemm(z, u, o[:, None], joined(u_scales, run, 0), peak, x_scale, bias=bias)
                continue
            for i in range(count):
                held = None if bias is None else bias.view(count, n)[i]
                torch._scaled_mm(z[i], u[i].T, rows, scales[i], held, out_dtype=dtype, use_fast_accum=True, out=o[i])
    return out
