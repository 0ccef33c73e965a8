"""Pivoted in float8: a gather of the inputs that are cast already, and low-rank's products."""

from __future__ import annotations

from hf_blr.ops.triton.columns import gather_columns
from hf_blr.ops.triton.float8_gemm import LONGER, peak_of_codes
from hf_blr.ops.triton.float8_low_rank import both_stages


def forward(x, x_scale, tensors, scales, bias, dtype, activation):
    """x `[T, K]` float8 with x_scale `[T]` -> `[T, N]` in dtype.

    tensors (u `[N, R]`, c `[R, K - R]`) float8, with scales `[.., 1]`, and order `[K]`.
    """
    (u, c, order), (u_scale, c_scale, _) = tensors, scales
    pivots, rest = gather_columns(x, order, u.shape[1])
    peak = peak_of_codes(c.shape[1], c_scale.view(1, 1, -1), extra=LONGER)
    return both_stages(rest, x_scale, u, u_scale, c, c_scale, peak, pivots, bias, dtype, activation)
