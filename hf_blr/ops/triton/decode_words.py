"""1 to 16 tokens on many rows in bits: programs that stay and hold x in registers, in the layout of tensor cores.

As `decode_places`, whose products these are, for rows so short that a warp's part of x fits its registers.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hf_blr.ops.triton.activate import activate
from hf_blr.ops.triton.bits import by_place, places_of
from hf_blr.ops.triton.tiles import in_part, prefetch_to_l2, wait_for_previous


@triton.jit
def scales_of(
    ws_ptr, o_s, o_j, m_q, columns, PER: tl.constexpr, SCALED: tl.constexpr, STEPS: tl.constexpr, BC: tl.constexpr
):
    """Of a tile: `[BJ, BQ]` of each step, or of whole rows one."""
    pieces = ()
    if SCALED > 0:
        for step in tl.static_range(STEPS):
            first = o_j + step * BC
            m = (first < columns)[:, None] & m_q[None, :]
            pieces = pieces + (tl.load(ws_ptr + o_s + (first * PER // SCALED)[:, None], mask=m, other=0.0),)
    else:
        m = m_q[None, :] & (o_j >= 0)[:, None]
        pieces = pieces + (tl.load(ws_ptr + o_s, mask=m, other=0.0),)
    return pieces


@triton.jit
def decode_words_kernel(
    x_ptr,
    w_ptr,
    ws_ptr,
    bias_ptr,
    out_ptr,
    T,
    Q,
    GROUP,
    BLOCKS,
    GATED_BLOCKS,
    stride_og,
    stride_ot,
    PART,
    R,
    stride_xi,
    stride_xl,
    stride_xg,
    stride_xt,
    C,
    stride_wi,
    stride_wq,
    stride_si,
    stride_sq,
    HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    ADD: tl.constexpr,
    LINES: tl.constexpr,
    LINE: tl.constexpr,
    FORM: tl.constexpr,
    PER: tl.constexpr,
    SCALED: tl.constexpr,
    PDL: tl.constexpr,
    PRECISION: tl.constexpr,
    VEC: tl.constexpr,
    VEC_W: tl.constexpr,
    STEPS: tl.constexpr,
    BX: tl.constexpr,
    BJ: tl.constexpr,
    BT: tl.constexpr,
    BQ: tl.constexpr,
    BC: tl.constexpr,
):
    """As `decode_places.decode_places_kernel`, with STEPS steps to a part, and programs that go from tile to tile."""
    i_p, n_p, i_i = tl.program_id(0), tl.num_programs(0), tl.program_id(1)
    o_t, o_b = tl.arange(0, BT), tl.arange(0, BJ)
    o_tx = tl.arange(0, BX)
    o_g, o_j = (o_b % 2, o_b // 2 * PART) if GATED else (o_b * 0, o_b * PART)
    columns = C * VEC_W
    o_wi = (i_i + o_g * GATED_BLOCKS).to(tl.int64) * (stride_wi * VEC_W) + o_j
    o_si = (i_i + o_g * GATED_BLOCKS) * stride_si
    if PDL:
        o_q = i_p * BQ + tl.arange(0, BQ)
        o_l = tl.arange(0, LINES) * LINE
        m_l = in_part(o_l, o_j, PART, columns)[:, None, :] & (o_q < Q)[None, :, None]
        prefetch_to_l2(w_ptr, o_wi[:, None, None] + o_q[None, :, None] * (stride_wq * VEC_W) + o_l[None, None, :], m_l)
    wait_for_previous(PDL)
    x_ptr += (i_i % BLOCKS) * (stride_xi * VEC) + (i_i // BLOCKS) * (stride_xl * VEC)
    o_x = (o_g * (stride_xg * VEC))[:, None, None] + (o_tx * (stride_xt * VEC))[None, :, None]
    o_c, o_r = tl.arange(0, BC), tl.arange(0, BC * PER)
    b_xs = ()
    for step in tl.static_range(STEPS):
        o_jr = ((o_j + step * BC) * PER)[:, None] + o_r[None, :]
        m_x = (o_jr < R * VEC)[:, None, :] & (o_tx < T)[None, :, None]
        b_x = tl.load(x_ptr + o_x + o_jr[:, None, :], mask=m_x, other=0.0)
        b_xs = b_xs + by_place(tl.broadcast_to(b_x, (BJ, BT, BC * PER)), FORM)
    o_q = i_p * BQ + tl.arange(0, BQ)
    o_s = o_si[:, None] + (o_q * stride_sq)[None, :]
    b_ss = scales_of(ws_ptr, o_s, o_j, o_q < Q, columns, PER, SCALED, STEPS, BC)
    for i_q in tl.range(i_p, tl.cdiv(Q, BQ), n_p):
        o_q = i_q * BQ + tl.arange(0, BQ)
        m_q = o_q < Q
        o_w = o_wi[:, None, None] + o_q[None, :, None] * (stride_wq * VEC_W)
        o_next = o_q + n_p * BQ
        b_next = scales_of(
            ws_ptr, o_si[:, None] + (o_next * stride_sq)[None, :], o_j, o_next < Q, columns, PER, SCALED, STEPS, BC
        )
        acc = tl.zeros((BJ, BQ, BT), tl.float32)
        for step in tl.static_range(STEPS):
            m_w = (o_j[:, None] + (step * BC + o_c)[None, :] < columns)[:, None, :] & m_q[None, :, None]
            b_w = tl.load(
                w_ptr + o_w + (step * BC + o_c)[None, None, :], mask=m_w, other=0, eviction_policy="evict_first"
            )
            b_ws = places_of(b_w, FORM, PER, x_ptr.dtype.element_ty)
            b = tl.zeros((BJ, BQ, BT), tl.float32) if SCALED > 0 else acc
            for j in tl.static_range(PER):
                b = tl.dot(b_ws[j], tl.permute(b_xs[step * PER + j], (0, 2, 1)), b, input_precision=PRECISION)
            acc = acc + b * b_ss[step].to(tl.float32)[:, :, None] if SCALED > 0 else b
        if SCALED == 0:
            acc *= b_ss[0].to(tl.float32)[:, :, None]
        o_n = i_i * Q + o_q
        if GATED:
            b_sums = tl.sum(tl.reshape(acc, (BJ // 2, 2, BQ, BT)), 0)
            b_out, b_up = tl.split(tl.permute(b_sums, (1, 2, 0)))
        else:
            b_out = tl.sum(acc, 0)
        if HAS_BIAS:
            b_out += tl.load(bias_ptr + o_n, mask=m_q, other=0.0).to(tl.float32)[:, None]
        o_o = ((o_q // GROUP) * stride_og + i_i * GROUP + o_q % GROUP)[:, None] + o_t.to(tl.int64)[None, :] * stride_ot
        m = m_q[:, None] & (o_t < T)[None, :]
        if ADD:
            b_out += tl.load(out_ptr + o_o, mask=m, other=0.0).to(tl.float32)
        b_out = activate(b_out, ACTIVATION)
        if GATED:
            if HAS_BIAS:
                b_up += tl.load(bias_ptr + GATED_BLOCKS * Q + o_n, mask=m_q, other=0.0).to(tl.float32)[:, None]
            b_out *= b_up
        tl.store(out_ptr + o_o, b_out.to(out_ptr.dtype.element_ty), mask=m)
        b_ss = b_next
