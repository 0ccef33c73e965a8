"""Monarch in float8: two stacks of products, the first of which stores where the second reads."""

from __future__ import annotations

from hf_blr.ops.triton.float8_gemm import float8_gemm, in_lines, peak_of_codes


def forward(x, x_scale, tensors, scales, bias, dtype, activation):
    """x `[T, K]` float8 with x_scale `[T]` -> `[T, N]` in dtype.

    tensors (u `[B2, Q, B1*R]`, v `[B1, B2*R, P]`) float8, with scales `[.., 1]`; v with gaps between its blocks where
    layers that run together lie in one buffer.
    """
    (u, v), (u_scale, v_scale) = tensors, scales
    tokens, (b1, rows, p), (b2, q, _) = x.shape[0], v.shape, u.shape
    out, r = x.new_empty(tokens, b2 * q, dtype=dtype), rows // b2
    if tokens == 0:
        return out
    peak = peak_of_codes(p, v_scale.view(b1, b2, r))
    z = in_lines(x, b2, tokens, b1 * r)
    swapped = z.view(b2, tokens, b1, r).permute(2, 0, 1, 3)
    float8_gemm(x.view(tokens, b1, p).transpose(0, 1), v, swapped, v_scale, peak)
    blocks = out.view(1, tokens, b2, q).transpose(1, 2)
    float8_gemm(z, u, blocks, u_scale, peak, x_scale, bias=bias, activation=activation)
    return out
