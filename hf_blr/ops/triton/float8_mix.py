"""BLAST's mix between two stages in float8: y and z are float8, the weights of the mix are not."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from hf_blr.ops.rules.device import device_of, pow2
from hf_blr.ops.rules.float8 import weights_config
from hf_blr.ops.triton.float8_gemm import LONGER, in_lines
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
    stride_scale,
    B1: tl.constexpr,
    LONGER: tl.constexpr,
    BJ: tl.constexpr,
    BR: tl.constexpr,
):
    """peaks[i] = LONGER * max_r ||(s scale)[i, :, r]|| and weights = s scale / peaks, of s `[B2, B1, R]`.

    scale `[B1, R, 1]` is that of v's rows. One output block i a program.
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
        b_w *= tl.load(scale_ptr + o_j[:, None] * stride_scale + o_r, mask=m, other=0.0).to(tl.float32)
        largest = tl.maximum(largest, tl.sum(b_w * b_w, 0))
    # all of a block's s may be zero
    peak = tl.maximum(LONGER * tl.sqrt(tl.max(largest, 0)), 1e-30)
    tl.store(peaks_ptr + i_i, peak)
    weights_ptr += i_i.to(tl.int64) * (B1 * R) + o_j[:, None] * R
    for step in range(0, tl.cdiv(R, BR)):
        o_r = step * BR + tl.arange(0, BR)[None, :]
        m = m_j & (o_r < R)
        b_w = tl.load(s_ptr + o_r, mask=m, other=0.0).to(tl.float32)
        b_w *= tl.load(scale_ptr + o_j[:, None] * stride_scale + o_r, mask=m, other=0.0).to(tl.float32)
        tl.store(weights_ptr + o_r, (b_w / peak).to(weights_ptr.dtype.element_ty), mask=m)


def float8_mix(y, s, v_scale):
    """(z `[B2, T, R]`, peaks `[B2]`) of y `[B1, T, R]` without v's scale; see `float8_gemm.Peak`.

    y and z are float8, s `[B2, B1, R]` is not; v_scale is `[B1, R, 1]`.
    """
    b2, b1, r = s.shape
    weights, peaks = torch.empty_like(s), s.new_empty(b2, dtype=torch.float32)
    block, warps = weights_config(b1, r, device_of(s))
    mix_weights_kernel[(b2,)](
        s,
        v_scale,
        weights,
        peaks,
        r,
        *s.stride()[:2],
        v_scale.stride(0),
        B1=b1,
        LONGER=LONGER,
        BJ=pow2(b1),
        BR=block,
        num_warps=warps,
    )
    return blast_mix(y, weights, z=in_lines(y, b2, y.shape[1], r)), peaks
