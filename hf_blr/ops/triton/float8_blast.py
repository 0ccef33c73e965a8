"""BLAST in float8: two stacks of products, whose mix between them takes float8 and gives float8."""

from __future__ import annotations

from hf_blr.ops.triton.float8_gemm import Peak, float8_gemm, peak_of_codes
from hf_blr.ops.triton.float8_mix import blocks_in_lines, float8_mix


def forward(x, x_scale, tensors, scales, bias, dtype, activation):
    """x `[T, K]` float8 with x_scale `[T]` -> `[T, N]` in dtype.

    tensors (u `[B2, Q, R]`, s, v `[B1, R, P]`) float8, with scales `[.., 1]`, but s `[B2, B1, R]` in dtype; v and s
    with gaps between their blocks where layers that run together lie in one buffer.
    """
    (u, s, v), (u_scale, _, v_scale) = tensors, scales
    tokens, (b1, r, p), (b2, q, _) = x.shape[0], v.shape, u.shape
    out = x.new_empty(tokens, b2 * q, dtype=dtype)
    if tokens == 0:
        return out
    codes, y = peak_of_codes(p), blocks_in_lines(x, b1, tokens, r)
    float8_gemm(x.view(tokens, b1, p).transpose(0, 1), v, y[:, None], None, codes, beside=True)
    z, peaks = float8_mix(y, s, v_scale)
    peak, blocks = Peak(codes.bound, peaks.view(1, b2, 1)), out.view(1, tokens, b2, q).transpose(1, 2)
    float8_gemm(z, u, blocks, u_scale, peak, x_scale, bias=bias, activation=activation)
    return out
