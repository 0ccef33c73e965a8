"""What products over the other axis take: columns cast to float8 as rows, and the transpose of codes."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from hf_blr.ops.rules.device import device_of
from hf_blr.ops.rules.float8 import columns_cast_config, transpose_tile


@triton.jit
def cast_columns_kernel(
    t_ptr,
    factor_ptr,
    rows_ptr,
    scale_ptr,
    M,
    L,
    LARGEST: tl.constexpr,
    SMALLEST_NORM: tl.constexpr,
    FACTOR: tl.constexpr,
    BM: tl.constexpr,
    BL: tl.constexpr,
):
    """rows `[L, M]` and scale `[L]` of `cast_rows_kernel` for the transpose of t `[M, L]`; BL columns a program.

    FACTOR: row m of t is multiplied by factor[m] first. t is read twice, the second time from L2.
    """
    o_l = tl.program_id(0) * BL + tl.arange(0, BL)
    m_l = o_l < L
    squares = tl.zeros((BL,), tl.float32)
    for step in range(0, tl.cdiv(M, BM)):
        squares += tl.sum(column_tile(t_ptr, factor_ptr, step, o_l, m_l, M, L, FACTOR, BM, squares=True), 0)
    norm = tl.maximum(tl.sqrt(squares), SMALLEST_NORM, propagate_nan=tl.PropagateNan.ALL)
    tl.store(scale_ptr + o_l, norm / LARGEST, mask=m_l)
    for step in range(0, tl.cdiv(M, BM)):
        b_t = column_tile(t_ptr, factor_ptr, step, o_l, m_l, M, L, FACTOR, BM, squares=False)
        b_rows = (b_t * (LARGEST / norm)[None, :]).to(rows_ptr.dtype.element_ty)
        o_m = step * BM + tl.arange(0, BM)
        tl.store(
            rows_ptr + o_l.to(tl.int64)[:, None] * M + o_m[None, :], b_rows.T, mask=m_l[:, None] & (o_m < M)[None, :]
        )


@triton.jit
def column_tile(t_ptr, factor_ptr, step, o_l, m_l, M, L, FACTOR: tl.constexpr, BM: tl.constexpr, squares: tl.constexpr):
    """[BM, BL] of t times factor in float32, zero outside; or its squares."""
    o_m = step * BM + tl.arange(0, BM)
    m_m = o_m < M
    o = o_m.to(tl.int64)[:, None] * L + o_l[None, :]
    b_t = tl.load(t_ptr + o, mask=m_m[:, None] & m_l[None, :], other=0.0).to(tl.float32)
    if FACTOR:
        b_t *= tl.load(factor_ptr + o_m, mask=m_m, other=0.0)[:, None]
    return b_t * b_t if squares else b_t


def cast_columns(t, largest, smallest_norm, factor=None):
    """`cast_rows` of the transpose `[L, M]` of t `[M, L]` contiguous, times factor `[M]` float32 if there is one."""
    m, length = t.shape
    rows, scale = t.new_empty(length, m, dtype=torch.float8_e4m3fn), t.new_empty(length, dtype=torch.float32)
    config = columns_cast_config(device_of(t))
    if t.numel():
        cast_columns_kernel[(triton.cdiv(length, config.bc),)](
            t,
            factor,
            rows,
            scale,
            m,
            length,
            LARGEST=largest,
            SMALLEST_NORM=smallest_norm,
            FACTOR=factor is not None,
            BM=config.bt,
            BL=config.bc,
            num_warps=config.warps,
        )
    return rows, scale


@triton.jit
def transpose_codes_kernel(codes_ptr, out_ptr, ones_ptr, M, L, B: tl.constexpr):
    """out `[L, M]` of codes `[M, L]`, bytes, in tiles of B x B, and ones `[L]`."""
    i_m = tl.program_id(0)
    o_m = i_m * B + tl.arange(0, B)
    o_l = tl.program_id(1) * B + tl.arange(0, B)
    m_m, m_l = o_m < M, o_l < L
    b_codes = tl.load(codes_ptr + o_m.to(tl.int64)[:, None] * L + o_l[None, :], mask=m_m[:, None] & m_l[None, :])
    tl.store(out_ptr + o_l.to(tl.int64)[:, None] * M + o_m[None, :], b_codes.T, mask=m_l[:, None] & m_m[None, :])
    if i_m == 0:
        tl.store(ones_ptr + o_l, tl.full((B,), 1.0, tl.float32), mask=m_l)


def transposed_codes(codes):
    """(`[L, M]` of codes `[M, L]` float8, contiguous both, a scale of ones `[L]` float32)."""
    m, length = codes.shape
    out, ones = codes.new_empty(length, m), codes.new_empty(length, dtype=torch.float32)
    if not codes.numel():
        return out, ones.fill_(1)
    tile, warps = transpose_tile(m, length, device_of(codes))
    grid = (triton.cdiv(m, tile), triton.cdiv(length, tile))
    given, taken = codes.view(torch.uint8), out.view(torch.uint8)
    transpose_codes_kernel[grid](given, taken, ones, m, length, B=tile, num_warps=warps)
    return out, ones
