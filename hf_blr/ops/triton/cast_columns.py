"""What products over the other axis take: columns cast to float8 as rows, and the transpose of codes."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from hf_blr.ops.rules.device import device_of
from hf_blr.ops.rules.float8 import column_tiles, transpose_tile
from hf_blr.ops.triton.cast import roomy


@triton.jit
def column_squares_kernel(
    t_ptr,
    factor_ptr,
    second_ptr,
    squares_ptr,
    M,
    L,
    stride_m,
    CHUNK,
    FACTORS: tl.constexpr,
    BM: tl.constexpr,
    BL: tl.constexpr,
):
    """squares[c, l], the sum over the CHUNK rows m of chunk c of (t[m, l] times factors of m)^2, for t `[M, L]`."""
    i_c = tl.program_id(1)
    o_l = tl.program_id(0) * BL + tl.arange(0, BL)
    b_squares = tl.zeros((BM, BL), tl.float32)
    for start in range(i_c * CHUNK, min(M, i_c * CHUNK + CHUNK), BM):
        b_t = scaled_tile(t_ptr, factor_ptr, second_ptr, start + tl.arange(0, BM), o_l, M, L, stride_m, FACTORS)
        b_squares += b_t * b_t
    tl.store(squares_ptr + i_c * L + o_l, tl.sum(b_squares, 0), mask=o_l < L)


@triton.jit
def cast_columns_kernel(
    t_ptr,
    factor_ptr,
    second_ptr,
    outer_ptr,
    squares_ptr,
    rows_ptr,
    codes_ptr,
    ones_ptr,
    scale_ptr,
    M,
    L,
    stride_m,
    stride_c,
    CHUNKS,
    LARGEST: tl.constexpr,
    SMALLEST_NORM: tl.constexpr,
    FACTORS: tl.constexpr,
    OUTER: tl.constexpr,
    BOTH: tl.constexpr,
    BC: tl.constexpr,
    BM: tl.constexpr,
    BL: tl.constexpr,
):
    """rows `[L, M]` and scale `[L]` of `cast_rows_kernel` for the transpose of t `[M, L]`, in tiles of BM x BL.

    FACTORS: row m of t is multiplied by factor[m] first, and by second[m]. OUTER: scale is by outer `[L]`. BOTH: also
    their transpose, codes `[M, L]`, and ones `[M]`.
    """
    i_l, i_m = tl.program_id(0), tl.program_id(1)
    o_m, o_l = i_m * BM + tl.arange(0, BM), i_l * BL + tl.arange(0, BL)
    m_m, m_l, o_c = o_m < M, o_l < L, tl.arange(0, BC)
    o_s = o_c[:, None] * L + o_l[None, :]
    squares = tl.sum(tl.load(squares_ptr + o_s, mask=(o_c < CHUNKS)[:, None] & m_l[None, :], other=0.0), 0)
    # NaN must not become the smallest norm
    norm = tl.maximum(tl.sqrt(squares), SMALLEST_NORM, propagate_nan=tl.PropagateNan.ALL)
    if i_m == 0:
        scale = norm / LARGEST
        if OUTER:
            scale *= tl.load(outer_ptr + o_l, mask=m_l, other=0.0)
        tl.store(scale_ptr + o_l, scale, mask=m_l)
    b_t = scaled_tile(t_ptr, factor_ptr, second_ptr, o_m, o_l, M, L, stride_m, FACTORS)
    b_codes = (b_t * (LARGEST / norm)[None, :]).to(rows_ptr.dtype.element_ty)
    if BOTH:
        tl.store(
            codes_ptr + o_m.to(tl.int64)[:, None] * stride_c + o_l[None, :], b_codes, mask=m_m[:, None] & m_l[None, :]
        )
        if i_l == 0:
            tl.store(ones_ptr + o_m, tl.full((BM,), 1.0, tl.float32), mask=m_m)
    tl.store(rows_ptr + o_l.to(tl.int64)[:, None] * M + o_m[None, :], b_codes.T, mask=m_l[:, None] & m_m[None, :])


@triton.jit
def scaled_tile(t_ptr, factor_ptr, second_ptr, o_m, o_l, M, L, stride_m, FACTORS: tl.constexpr):
    """t[o_m, o_l] in float32, times factor[o_m] and second[o_m], zero outside."""
    m = (o_m < M)[:, None] & (o_l < L)[None, :]
    b_t = tl.load(t_ptr + o_m.to(tl.int64)[:, None] * stride_m + o_l[None, :], mask=m, other=0.0).to(tl.float32)
    if FACTORS > 0:
        b_t *= tl.load(factor_ptr + o_m, mask=o_m < M, other=0.0)[:, None]
    if FACTORS > 1:
        b_t *= tl.load(second_ptr + o_m, mask=o_m < M, other=0.0)[:, None]
    return b_t


def cast_columns(t, largest, smallest_norm, factors=(), outer=None):
    """(rows `[L, M]`, scale `[L]`) of the transpose of t `[M, L]`, as `cast.cast_rows` gives them.

    The rows of t are contiguous, and may lie apart. factors: at most two `[M]` float32, which multiply t first. outer:
    `[L]` float32, which goes into scale. Two kernels: sums of squares by chunks of rows, tiles.
    """
    return cast_tiles(t, largest, smallest_norm, factors, outer, None, None)


def cast_both(t, largest, smallest_norm):
    """What `cast_columns` returns, and the same codes as t lies, with the scale that is left of theirs.

    ((rows `[L, M]`, scale `[L]`), (codes `[M, L]`, ones `[M]`)).
    """
    codes, ones = roomy(t, *t.shape), t.new_empty(len(t), dtype=torch.float32)
    return cast_tiles(t, largest, smallest_norm, (), None, codes, ones), (codes, ones)


def cast_tiles(t, largest, smallest_norm, factors, outer, codes, ones):
    m, length = t.shape
    rows, scale = t.new_empty(length, m, dtype=torch.float8_e4m3fn), t.new_empty(length, dtype=torch.float32)
    if not t.numel():
        return rows, scale
    factor, second, *_ = *factors, None, None
    tiles = column_tiles(m, length, device_of(t))
    chunks = triton.cdiv(m, tiles.chunk)
    squares = t.new_empty(chunks, length, dtype=torch.float32)
    bm, bl, warps = tiles.summed
    column_squares_kernel[(triton.cdiv(length, bl), chunks)](
        t,
        factor,
        second,
        squares,
        m,
        length,
        t.stride(0),
        tiles.chunk,
        FACTORS=len(factors),
        BM=bm,
        BL=bl,
        num_warps=warps,
    )
    bm, bl, warps = tiles.cast
    cast_columns_kernel[(triton.cdiv(length, bl), triton.cdiv(m, bm))](
        t,
        factor,
        second,
        outer,
        squares,
        rows,
        codes,
        ones,
        scale,
        m,
        length,
        t.stride(0),
        t.stride(0) if codes is None else codes.stride(0),
        chunks,
        LARGEST=largest,
        SMALLEST_NORM=smallest_norm,
        FACTORS=len(factors),
        OUTER=outer is not None,
        BOTH=codes is not None,
        BC=triton.next_power_of_2(chunks),
        BM=bm,
        BL=bl,
        num_warps=warps,
    )
    return rows, scale


@triton.jit
def transpose_codes_kernel(codes_ptr, out_ptr, ones_ptr, M, L, stride_o, B: tl.constexpr):
    """out `[L, M]` of codes `[M, L]`, bytes, in tiles of B x B, and ones `[L]`."""
    i_m = tl.program_id(0)
    o_m = i_m * B + tl.arange(0, B)
    o_l = tl.program_id(1) * B + tl.arange(0, B)
    m_m, m_l = o_m < M, o_l < L
    b_codes = tl.load(codes_ptr + o_m.to(tl.int64)[:, None] * L + o_l[None, :], mask=m_m[:, None] & m_l[None, :])
    tl.store(out_ptr + o_l.to(tl.int64)[:, None] * stride_o + o_m[None, :], b_codes.T, mask=m_l[:, None] & m_m[None, :])
    if i_m == 0:
        tl.store(ones_ptr + o_l, tl.full((B,), 1.0, tl.float32), mask=m_l)


def transposed_codes(codes, rooms=False):
    """(`[L, M]` of codes `[M, L]` float8, a scale of ones `[L]` float32); rooms: of rows as `roomy` lays them."""
    m, length = codes.shape
    out = roomy(codes, length, m) if rooms else codes.new_empty(length, m)
    ones = codes.new_empty(length, dtype=torch.float32)
    if not codes.numel():
        return out, ones.fill_(1)
    tile, warps = transpose_tile(m, length, device_of(codes))
    grid = (triton.cdiv(m, tile), triton.cdiv(length, tile))
    given, taken = codes.view(torch.uint8), out.view(torch.uint8)
    transpose_codes_kernel[grid](given, taken, ones, m, length, out.stride(0), B=tile, num_warps=warps)
    return out, ones
