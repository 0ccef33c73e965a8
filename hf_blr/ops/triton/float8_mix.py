"""BLAST's mix between two stages in float8: y and z are float8, and what is between them is float16.

A register holds two numbers of float16, of neighbouring ranks, so that an instruction serves both. Both ends of what
float16 holds suffice: no sum exceeds the largest number of float8, and what is lost lies far below its smallest.
Programs keep their weights in registers and go from token to token: weights that are loaded where they are needed make
all wait.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from hf_blr.ops.rules.device import device_of, pow2
from hf_blr.ops.rules.float8 import float8_mix_config, weights_config
from hf_blr.ops.triton.float8_gemm import LONGER, in_lines
from hf_blr.ops.triton.float8_words import fma_of_halves, halves_of_words, words_of_halves
from hf_blr.ops.triton.tiles import end_after_previous
from hf_blr.ops.triton.tuned import launch


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
    ROWS: tl.constexpr,
    LONGER: tl.constexpr,
    PDL: tl.constexpr,
    BW: tl.constexpr,
    BJ: tl.constexpr,
    BR: tl.constexpr,
):
    """peaks[i] = LONGER * max_r ||(s scale)[i, :, r]|| and weights = s scale / peaks, of s `[B2, B1, R]`.

    scale `[B1, R, 1]` is that of v's rows. weights `[R/BW, ROWS, B1, BW]` are zero behind the last rank. One output
    block i a program. PDL: it runs beside the first stage, of which it needs nothing, and ends after it.
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
    padded = tl.cdiv(R, BW) * BW
    for step in range(0, tl.cdiv(padded, BR)):
        o_r = step * BR + tl.arange(0, BR)[None, :]
        m = m_j & (o_r < R)
        b_w = tl.load(s_ptr + o_r, mask=m, other=0.0).to(tl.float32)
        b_w *= tl.load(scale_ptr + o_j[:, None] * stride_scale + o_r, mask=m, other=0.0).to(tl.float32)
        o_w = (o_r // BW) * (ROWS * B1 * BW) + (i_i * B1 + o_j[:, None]) * BW + o_r % BW
        tl.store(weights_ptr + o_w, (b_w / peak).to(weights_ptr.dtype.element_ty), mask=m_j & (o_r < padded))
    end_after_previous(PDL)


@triton.jit
def float8_mix_kernel(
    y_ptr,
    weights_ptr,
    z_ptr,
    T,
    WORDS,
    CHUNK,
    stride_yt,
    stride_zt,
    BLOCK: tl.constexpr,
    B1: tl.constexpr,
    B2: tl.constexpr,
    GROUPS: tl.constexpr,
    ROWS: tl.constexpr,
    BT: tl.constexpr,
    BW: tl.constexpr,
    AHEAD: tl.constexpr,
):
    """z[t,i,r] = sum_j weights[i,j,r] y[t,j,r], y `[T, B1, WORDS]` and z `[T, B2, WORDS]`, words of four ranks.

    weights `[WORDS/BW, GROUPS*ROWS, B1, BW]`, int64 of four float16. BLOCK: the stride of blocks in y and in z. A
    program takes CHUNK tokens, BT at a time, and asks for y AHEAD steps before its turn. Each of GROUPS of warps has
    ROWS output blocks, so that weights fit the registers; what one of them reads of y the others find in L1.
    """
    i_r, i_c = tl.program_id(0), tl.program_id(1)
    o_b = tl.arange(0, BW)[None, None, :] + tl.zeros((GROUPS, BT, 1), tl.int32)
    o_i, o_t, o_r = tl.arange(0, GROUPS)[:, None, None] * ROWS, tl.arange(0, BT)[None, :, None], i_r * BW + o_b
    weights_ptr += i_r * (GROUPS * ROWS * B1 * BW)
    b_lows, b_highs = (), ()
    for k in tl.static_range(ROWS * B1):
        b_w = tl.load(weights_ptr + k * BW + o_i * (B1 * BW) + o_b)
        b_lows, b_highs = b_lows + (b_w.to(tl.int32),), b_highs + ((b_w >> 32).to(tl.int32),)
    m_r = o_r < WORDS
    start = i_c * CHUNK
    end = tl.minimum(start + CHUNK, T)
    p_y = y_ptr + start.to(tl.int64) * stride_yt + (o_t * stride_yt + o_r)
    p_z = z_ptr + start.to(tl.int64) * stride_zt + (o_t * stride_zt + o_r + o_i * BLOCK)
    # words behind the last token or rank are anything: they reach nothing but such words
    b_ys = ()
    for i in tl.static_range(AHEAD):
        for j in tl.static_range(B1):
            b_ys = b_ys + (tl.load(p_y + j * BLOCK, mask=m_r & (start + i * BT + o_t < end)),)
        p_y += BT * stride_yt
    for t in range(start, end, BT):
        m_y = m_r & (t + AHEAD * BT + o_t < end)
        b_zs, b_next = (), ()
        for _ in tl.static_range(2 * ROWS):
            b_zs = b_zs + (tl.zeros((GROUPS, BT, BW), tl.int32),)
        for i in tl.static_range(B1, AHEAD * B1):
            b_next = b_next + (b_ys[i],)
        for j in tl.static_range(B1):
            b_low, b_high = halves_of_words(b_ys[j])
            b_next = b_next + (tl.load(p_y + j * BLOCK, mask=m_y),)
            b_sums = ()
            for i in tl.static_range(ROWS):
                b_sums = b_sums + (fma_of_halves(b_lows[i * B1 + j], b_low, b_zs[2 * i]),)
                b_sums = b_sums + (fma_of_halves(b_highs[i * B1 + j], b_high, b_zs[2 * i + 1]),)
            b_zs = b_sums
        b_ys = b_next
        m_z = m_r & (t + o_t < end)
        for i in tl.static_range(ROWS):
            m = m_z if GROUPS * ROWS == B2 else m_z & (o_i + i < B2)
            tl.store(p_z + i * BLOCK, words_of_halves(b_zs[2 * i], b_zs[2 * i + 1]), mask=m)
        p_y += BT * stride_yt
        p_z += BT * stride_zt


def float8_mix(y, s, v_scale):
    """(z `[B2, T, R]`, peaks `[B2]`) of y `[B1, T, R]` without v's scale; see `float8_gemm.Peak`.

    y and z are float8, with the blocks of a token side by side (`blocks_in_lines`); s `[B2, B1, R]` is not. v_scale is
    `[B1, R, 1]`.
    """
    (b2, b1, r), tokens, device = s.shape, y.shape[1], device_of(s)
    z, peaks = blocks_in_lines(y, b2, tokens, r), s.new_empty(b2, dtype=torch.float32)

    def run(config):
        rows, tiles = triton.cdiv(b2, config.groups), triton.cdiv(r, config.br)
        weights = s.new_empty(tiles, config.groups * rows, b1, config.br, dtype=torch.float16)
        block, warps = weights_config(b1, r, device)
        mix_weights_kernel[(b2,)](
            s,
            v_scale,
            weights,
            peaks,
            r,
            *s.stride()[:2],
            v_scale.stride(0),
            B1=b1,
            ROWS=config.groups * rows,
            LONGER=LONGER,
            PDL=device.has_pdl,
            BW=config.br,
            BJ=pow2(b1),
            BR=block,
            num_warps=warps,
            **device.launch_options,
        )
        chunk = triton.cdiv(tokens, max(1, config.programs * device.sms // tiles))
        chunk = triton.cdiv(chunk, config.bt) * config.bt
        float8_mix_kernel[(tiles, triton.cdiv(tokens, chunk))](
            y.view(torch.int32),
            weights.view(torch.int64),
            z.view(torch.int32),
            tokens,
            r // 4,
            chunk,
            y.stride(1) // 4,
            z.stride(1) // 4,
            BLOCK=z.stride(0) // 4,
            B1=b1,
            B2=b2,
            GROUPS=config.groups,
            ROWS=rows,
            BT=config.bt,
            BW=config.br // 4,
            AHEAD=config.ahead,
            num_warps=config.warps,
        )

    launch(run, "float8_mix", float8_mix_config(b1, b2, device), tokens, (b1, b2, r), y)
    return z, peaks


def blocks_in_lines(like, blocks, tokens, r):
    """An empty `[blocks, T, R]` like `like` for `float8_mix`: the rows of a token lie side by side, in lines."""
    return in_lines(like, tokens, blocks, r).transpose(0, 1)
