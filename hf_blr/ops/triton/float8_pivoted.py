"""Pivoted in float8: a gather of the inputs that are cast already, and low-rank's products."""

from __future__ import annotations

from hf_blr.ops.triton.columns import gather_columns
from hf_blr.ops.triton.float8_gemm import LONGER, float8_gemm, peak_of_codes


def forward(x, x_scale, tensors, scales, bias, dtype, activation):
    """x `[T, K]` float8 with x_scale `[T]` -> `[T, N]` in dtype.

    tensors (u `[N, R]`, c `[R, K - R]`) float8, with scales `[.., 1]`, and order `[K]`.
    """
    (u, c, order), (u_scale, c_scale, _) = tensors, scales
    tokens, (n, r) = x.shape[0], u.shape
    out = x.new_empty(tokens, n, dtype=dtype)
    if tokens == 0:
        return out
    pivots, rest = gather_columns(x, order, r)
    peak = peak_of_codes(c.shape[1], c_scale.view(1, 1, r), extra=LONGER)
    y = x.new_empty(tokens, r)
    float8_gemm(rest[None], c[None], y[None, None], c_scale, peak, pivots=pivots)
    float8_gemm(y[None], u[None], out[None, None], u_scale, peak, x_scale, bias=bias, activation=activation)
    return out
