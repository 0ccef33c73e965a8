"""BLAST in float8: two stacks of products, whose mix between them takes float8 and gives float8."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from hf_blr.ops.rules.device import pow2
from hf_blr.ops.triton.float8_gemm import LONGER, Peak, float8_gemm, peak_of_codes
from hf_blr.ops.triton.mix import blast_mix


@triton.jit
def mix_weights_kernel(
    s_ptr,
    scale_ptr,
    weights_ptr,
    peaks_ptr,
    R,
    stride_si,
    stride_sj,
    B1: tl.constexpr,
    LONGER: tl.constexpr,
    BJ: tl.constexpr,
    BR: tl.constexpr,
):
    """peaks[i] = LONGER * max_r ||(s scale)[i, :, r]|| and weights = s scale / peaks, of s `[B2, B1, R]`.

    scale `[B1, R]` is that of v's rows. One output block i a program.
    """
    i_i = tl.program_id(0)
    o_j = tl.arange(0, BJ)
    m_j = (o_j < B1)[:, None]
    s_ptr += i_i.to(tl.int64) * stride_si + o_j[:, None] * stride_sj
    largest = tl.zeros((BR,), tl.float32)
    for step in range(0, tl.cdiv(R, BR)):
        o_r = step * BR + tl.arange(0, BR)[None, :]
        m = m_j & (o_r < R)
        b_w = tl.load(s_ptr + o_r, mask=m, other=0.0).to(tl.float32)
        b_w *= tl.load(scale_ptr + o_j[:, None] * R + o_r, mask=m, other=0.0).to(tl.float32)
        largest = tl.maximum(largest, tl.sum(b_w * b_w, 0))
    # all of a block's s may be zero
    peak = tl.maximum(LONGER * tl.sqrt(tl.max(largest, 0)), 1e-30)
    tl.store(peaks_ptr + i_i, peak)
    weights_ptr += i_i.to(tl.int64) * (B1 * R) + o_j[:, None] * R
    for step in range(0, tl.cdiv(R, BR)):
        o_r = step * BR + tl.arange(0, BR)[None, :]
        m = m_j & (o_r < R)
        b_w = tl.load(s_ptr + o_r, mask=m, other=0.0).to(tl.float32)
        b_w *= tl.load(scale_ptr + o_j[:, None] * R + o_r, mask=m, other=0.0).to(tl.float32)
        tl.store(weights_ptr + o_r, (b_w / peak).to(weights_ptr.dtype.element_ty), mask=m)


def mix_weights(s, v_scale):
    """(weights `[B2, B1, R]`, peaks `[B2]`): what y of the first stage, without v's scale, is mixed by; see `Peak`."""
    b2, b1, r = s.shape
    weights, peaks = torch.empty_like(s), s.new_empty(b2, dtype=torch.float32)
    block = max(1, 4096 // pow2(b1))
    mix_weights_kernel[(b2,)](
        s,
        v_scale,
        weights,
        peaks,
        r,
        *s.stride()[:2],
        B1=b1,
        LONGER=LONGER,
        BJ=pow2(b1),
        BR=min(block, pow2(r)),
        num_warps=8,
    )
    return weights, peaks


def forward(x, x_scale, tensors, scales, bias, dtype, activation):
    """x `[T, K]` float8 with x_scale `[T]` -> `[T, N]` in dtype.

    tensors (u `[B2, Q, R]`, s, v `[B1, R, P]`) float8, with scales `[.., 1]`, but s `[B2, B1, R]` in dtype.
    """
    (u, s, v), (u_scale, _, v_scale) = tensors, scales
    tokens, (b1, r, p), (b2, q, _) = x.shape[0], v.shape, u.shape
    out = x.new_empty(tokens, b2 * q, dtype=dtype)
    if tokens == 0:
        return out
    codes = peak_of_codes(p)
    y = x.new_empty(b1, tokens, r)
    float8_gemm(x.view(tokens, b1, p).transpose(0, 1), v, y[:, None], None, codes)
    weights, peaks = mix_weights(s, v_scale)
    z, blocks = blast_mix(y, weights), out.view(1, tokens, b2, q).transpose(1, 2)
    peak = Peak(codes.bound, peaks.view(1, b2, 1))
    float8_gemm(z, u, blocks, u_scale, peak, x_scale, bias=bias, activation=activation)
    return out
