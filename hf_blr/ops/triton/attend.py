"""Attention of one query on keys and values of a fixed length, cut along the keys so that all multiprocessors read.

A second launch puts the pieces together (flash-decoding's scheme: Dao, Haziza, Massa and Sizov, 2023). Both take part
in dependent launches: on Hopper they overlap with what comes before and after them, as a layer's stages do.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from hf_blr.ops.rules.device import device_of, dot_precision, pow2
from hf_blr.ops.triton.tiles import prefetch_to_l2, wait_for_previous

#: keys that a program takes at a time, at most
KEYS = 64
#: pieces that are put together at a time
PIECES = 16


@triton.jit
def attend_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    mask_ptr,
    out_ptr,
    piece_ptr,
    weight_ptr,
    L,
    G,
    H,
    D,
    scale,
    stride_qb,
    stride_qh,
    stride_kb,
    stride_kh,
    stride_kl,
    stride_vb,
    stride_vh,
    stride_vl,
    stride_mb,
    WHOLE: tl.constexpr,
    PDL: tl.constexpr,
    PRECISION: tl.constexpr,
    LINE: tl.constexpr,
    STEPS: tl.constexpr,
    BG: tl.constexpr,
    BL: tl.constexpr,
    BD: tl.constexpr,
):
    """For the G queries of one key head, STEPS * BL keys from this program's on: out if WHOLE, else a piece of it.

    A piece is the sum of exp(score - highest) v, with the highest score and the sum of exp(score - highest) for each
    query. Keys whose mask is 0 are not seen.
    """
    i_bh, i_s, n_s = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    i_b, i_h = (i_bh // H).to(tl.int64), i_bh % H
    o_g, o_d = tl.arange(0, BG), tl.arange(0, BD)
    m_g, m_d = o_g < G, o_d < D
    k_ptr += i_b * stride_kb + i_h * stride_kh
    v_ptr += i_b * stride_vb + i_h * stride_vh
    mask_ptr += i_b * stride_mb
    first = i_s * STEPS * BL
    if PDL:
        # the kernel before may still write the newest: only a request, no value is read
        o_l, o_c = first + tl.arange(0, BL), tl.arange(0, BD // LINE) * LINE
        m_c = (o_l < L)[:, None] & (o_c < D)[None, :]
        prefetch_to_l2(k_ptr, o_l[:, None] * stride_kl + o_c[None, :], m_c)
        prefetch_to_l2(v_ptr, o_l[:, None] * stride_vl + o_c[None, :], m_c)
    wait_for_previous(PDL)
    o_q = i_b * stride_qb + (i_h * G + o_g)[:, None] * stride_qh + o_d[None, :]
    b_q = tl.load(q_ptr + o_q, mask=m_g[:, None] & m_d[None, :], other=0.0)
    highest = tl.full((BG,), float("-inf"), tl.float32)
    total = tl.zeros((BG,), tl.float32)
    acc = tl.zeros((BG, BD), tl.float32)
    for step in range(0, STEPS):
        o_l = first + step * BL + tl.arange(0, BL)
        m_l = o_l < L
        m = m_l[:, None] & m_d[None, :]
        b_k = tl.load(k_ptr + o_l[:, None] * stride_kl + o_d[None, :], mask=m, other=0.0)
        b_v = tl.load(v_ptr + o_l[:, None] * stride_vl + o_d[None, :], mask=m, other=0.0)
        seen = tl.load(mask_ptr + o_l, mask=m_l, other=0) != 0
        b_s = tl.dot(b_q, b_k.T, input_precision=PRECISION) * scale
        b_s = tl.where(seen[None, :], b_s, float("-inf"))
        higher = tl.maximum(highest, tl.max(b_s, 1))
        # nothing seen yet
        base = tl.where(higher == float("-inf"), 0.0, higher)
        b_p, shrink = tl.exp(b_s - base[:, None]), tl.exp(highest - base)
        total = total * shrink + tl.sum(b_p, 1)
        acc = tl.dot(b_p.to(b_v.dtype), b_v, acc * shrink[:, None], input_precision=PRECISION)
        highest = higher
    i_q = i_bh * G + o_g
    m_q = m_g[:, None] & m_d[None, :]
    if WHOLE:
        b_o = acc / tl.where(total == 0.0, 1.0, total)[:, None]
        o_o = i_q.to(tl.int64)[:, None] * D + o_d[None, :]
        tl.store(out_ptr + o_o, b_o.to(out_ptr.dtype.element_ty), mask=m_q)
    else:
        i_piece = i_q.to(tl.int64) * n_s + i_s
        tl.store(piece_ptr + i_piece[:, None] * D + o_d[None, :], acc, mask=m_q)
        tl.store(weight_ptr + i_piece * 2, highest, mask=m_g)
        tl.store(weight_ptr + i_piece * 2 + 1, total, mask=m_g)


@triton.jit
def attend_sum_kernel(piece_ptr, weight_ptr, out_ptr, N, D, PDL: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr):
    """out `[D]` of one query from its N pieces, BN at a time."""
    i_q = tl.program_id(0).to(tl.int64)
    o_n, o_d = tl.arange(0, BN), tl.arange(0, BD)
    piece_ptr += i_q * N * D
    weight_ptr += i_q * N * 2
    wait_for_previous(PDL)
    highest = float("-inf")
    total = 0.0
    acc = tl.zeros((BD,), tl.float32)
    for start in range(0, N, BN):
        m_n = start + o_n < N
        b_h = tl.load(weight_ptr + (start + o_n) * 2, mask=m_n, other=float("-inf"))
        b_t = tl.load(weight_ptr + (start + o_n) * 2 + 1, mask=m_n, other=0.0)
        o_a = (start + o_n)[:, None] * D + o_d[None, :]
        b_a = tl.load(piece_ptr + o_a, mask=m_n[:, None] & (o_d < D)[None, :], other=0.0)
        higher = tl.maximum(highest, tl.max(b_h, 0))
        base = tl.where(higher == float("-inf"), 0.0, higher)
        b_w, shrink = tl.exp(b_h - base), tl.exp(highest - base)
        total = total * shrink + tl.sum(b_w * b_t, 0)
        acc = acc * shrink + tl.sum(b_w[:, None] * b_a, 0)
        highest = higher
    b_o = acc / tl.where(total == 0.0, 1.0, total)
    tl.store(out_ptr + i_q * D + o_d, b_o.to(out_ptr.dtype.element_ty), mask=o_d < D)


def attend(q, k, v, mask, scale):
    """`[B, 1, HQ, D]` from q `[B, HQ, 1, D]`, k and v `[B, H, L, D]`, rows contiguous, and mask `[B, L]` of bytes."""
    (batch, heads, _, d), (_, h, length, _), device = q.shape, k.shape, device_of(q)
    group = heads // h
    # H100, us with 32 key heads or 8: 192 keys 4.5 and 4.4 at 64 a program, 5.8 and 5.3 at 128; 1024 keys 13.2 and 12.1
    # (32 heads); 4096 keys 22.4, 17.5 and 16.5 at 256 (8 heads)
    steps = 1 if length <= 512 else 2 if length <= 2048 else 4
    block = max(16, pow2(d))
    # keys and values of a step fit the smaller cards' shared memory
    keys = min(KEYS, max(16, (1 << 15) // (block * q.element_size())))
    pieces = triton.cdiv(length, steps * keys)
    out = q.new_empty(batch, 1, heads, d)
    whole = pieces == 1
    piece = q.new_empty(0 if whole else batch * heads * pieces * d, dtype=torch.float32)
    weight = q.new_empty(0 if whole else batch * heads * pieces * 2, dtype=torch.float32)
    attend_kernel[(batch * h, pieces)](
        q,
        k,
        v,
        mask,
        out,
        piece,
        weight,
        length,
        group,
        h,
        d,
        scale,
        q.stride(0),
        q.stride(1),
        *k.stride()[:3],
        *v.stride()[:3],
        mask.stride(0),
        WHOLE=whole,
        PDL=device.has_pdl,
        PRECISION=dot_precision(q.dtype),
        LINE=min(block, 128 // q.element_size()),
        STEPS=steps,
        BG=max(16, pow2(group)),
        BL=keys,
        BD=block,
        num_warps=4,
        num_stages=2,
        **device.launch_options,
    )
    if not whole:
        attend_sum_kernel[(batch * heads,)](
            piece,
            weight,
            out,
            pieces,
            d,
            PDL=device.has_pdl,
            BN=PIECES,
            BD=block,
            num_warps=4,
            **device.launch_options,
        )
    return out
