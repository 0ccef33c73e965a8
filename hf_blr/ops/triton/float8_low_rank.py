"""Low-rank in float8: two products, of which cuBLAS does the second best."""

from __future__ import annotations

import torch

from hf_blr.ops.rules.device import device_of
from hf_blr.ops.rules.float8 import multiplies_by_cublas
from hf_blr.ops.triton.float8_gemm import EmittedScales, float8_gemm, peak_of_codes


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
    y = x.new_empty(tokens, r)
    if multiplies_by_cublas(tokens, n, dtype == torch.bfloat16, bool(activation), device_of(x)):
        rows, columns = x_scale.new_empty(tokens, 1), x_scale.new_empty(1, n)
        emitted = EmittedScales(x_scale, u_scale, rows, columns)
        float8_gemm(x[None], v[None], y[None, None], v_scale, peak, pivots=pivots, emitted=emitted)
        return torch._scaled_mm(y, u.T, rows, columns, bias, out_dtype=dtype, use_fast_accum=True)
    out = x.new_empty(tokens, n, dtype=dtype)
    float8_gemm(x[None], v[None], y[None, None], v_scale, peak, pivots=pivots)
    float8_gemm(y[None], u[None], out[None, None], u_scale, peak, x_scale, bias=bias, activation=activation)
    return out
