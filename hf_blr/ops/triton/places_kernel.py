"""The kernel of `decode_places`: one stage on weights in bits, whose places tensor cores multiply one after the other.

A word holds numbers of several places, 0 to 7 of int4. Tensor cores take the numbers of one place of sixteen words with
the inputs that meet them, so that a number is multiplied by the thread that unpacked it. Words and inputs come into
those threads' registers straight from memory (`place_tiles.py`), the words of a step ahead, and those of the first step
before the wait for the kernel before. Each warp has a part of every row, so that none reads the x of another; rows too
long for that are shared by programs. A batch of products, one for each part, keeps Triton from Hopper's products of
four warps, which would take every place of x through shared memory.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hf_blr.ops.triton.place_steps import step_scales, step_sum, step_words
from hf_blr.ops.triton.place_tiles import input_places, load_inputs, warp_and_row
from hf_blr.ops.triton.places_out import put_rows
from hf_blr.ops.triton.tiles import in_part, prefetch_to_l2, wait_for_previous


@triton.jit
def decode_places_kernel(
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
    stride_os,
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
    V: tl.constexpr,
    BJ: tl.constexpr,
    BT: tl.constexpr,
    TILES: tl.constexpr,
    SPLITS: tl.constexpr,
    GROUPS: tl.constexpr,
    CHANGED: tl.constexpr,
    STEPS: tl.constexpr,
    AHEAD: tl.constexpr,
):
    """out[q // GROUP, t, i*GROUP + q % GROUP] = activation(w[i, q] . x[i, t] + bias[i, q]), with w `[blocks, Q, R]`.

    Blocks i from BLOCKS on belong to further layers, whose x lie stride_xl apart. GATED: out is that of block i times
    w[i + GATED_BLOCKS, q] . x + bias, whose x lies stride_xg behind. ADD adds what out holds. A program has TILES tiles
    of 16 rows. A row is cut into parts of PART words: BJ of a program, and of SPLITS programs, each of which puts out
    its own sum, stride_os apart. The grid's last axis has these programs for each of GROUPS of BT tokens. R and strides
    of x come / VEC, C and strides of w, in words of PER numbers, / VEC_W; V words are loaded at once, in the order that
    CHANGED says. SCALED numbers of a row share a scale of ws, which steps of 16 words divide, or all. With STEPS a part
    has so many steps, which follow each other without a loop: words and scales of AHEAD of them are loaded before the
    wait.
    """
    i_q, i_i = tl.program_id(0) * (TILES * 16), tl.program_id(1)
    i_s = tl.program_id(2)
    if GROUPS > 1:
        i_t, i_s = (i_s // SPLITS).to(tl.int64), i_s % SPLITS
        x_ptr += i_t * (BT * stride_xt * VEC)
        out_ptr += i_t * (BT * stride_ot)
        T -= (i_t * BT).to(tl.int32)
    first = i_s * (BJ * PART)
    columns = C * VEC_W
    # of two gated layers, each has every other part
    o_q, o_b = i_q + tl.arange(0, 16), tl.arange(0, BJ)
    o_g, o_j = (o_b % 2, o_b // 2 * PART) if GATED else (o_b * 0, first + o_b * PART)
    if PDL:
        o_w = (i_i + o_g * GATED_BLOCKS).to(tl.int64) * (stride_wi * VEC_W) + o_j
        o_l = tl.arange(0, LINES) * LINE
        for tile in tl.static_range(TILES):
            o_n = o_q + tile * 16
            m_l = in_part(o_l, o_j, PART, columns)[:, None, :] & (o_n < Q)[None, :, None]
            o_wn = o_w[:, None, None] + o_n[None, :, None] * (stride_wq * VEC_W)
            prefetch_to_l2(w_ptr, o_wn + o_l[None, None, :], m_l)
    # rows of words as they are loaded
    l_j, l_q = warp_and_row(tl.arange(0, BJ * 16), BJ)
    l_g, l_o = (l_j % 2, l_j // 2 * PART) if GATED else (l_j * 0, first + l_j * PART)
    l_end = tl.minimum(l_o + PART, columns)[:, None]
    l_q += i_q
    w_ptr += ((i_i + l_g * GATED_BLOCKS).to(tl.int64) * (stride_wi * VEC_W) + l_q * (stride_wq * VEC_W) + l_o)[:, None]
    stride_w, o_si = stride_wq * VEC_W, (i_i + o_g * GATED_BLOCKS) * stride_si
    accs = ()
    words = ()
    scales = ()
    for _tile in tl.static_range(TILES):
        accs = accs + (tl.zeros((BJ, 16, BT), tl.float32),)
    for step in tl.static_range(AHEAD):
        o_c = step * 16
        words = words + step_words(w_ptr + o_c, l_q, l_o[:, None] + o_c, l_end, Q, stride_w, V, TILES)
        if STEPS > 0 and SCALED > 0:
            scales = scales + step_scales(ws_ptr, o_si, o_j + o_c, o_q, columns, Q, stride_sq, PER, SCALED, TILES)
    # and of inputs
    t_j, t_t = warp_and_row(tl.arange(0, BJ * BT), BJ)
    t_g, t_o = (t_j % 2, t_j // 2 * PART) if GATED else (t_j * 0, first + t_j * PART)
    t_end = tl.minimum((t_o + PART) * PER, R * VEC)[:, None]
    t_o = (t_o * PER)[:, None]
    m_t = (t_t < T)[:, None]
    x_ptr += (i_i % BLOCKS) * (stride_xi * VEC) + (i_i // BLOCKS) * (stride_xl * VEC)
    x_ptr += (t_g * (stride_xg * VEC) + t_t * (stride_xt * VEC))[:, None] + t_o
    wait_for_previous(PDL)
    if STEPS > 0:
        AHEAD_X: tl.constexpr = AHEAD if AHEAD < 2 else 2
        inputs = ()
        for step in tl.static_range(AHEAD_X):
            o_x = step * 16 * PER
            inputs = inputs + (load_inputs(x_ptr + o_x, m_t, t_o + o_x, t_end, V, PER, CHANGED),)
        for step in tl.static_range(STEPS):
            if step + AHEAD_X < STEPS:
                o_x = (step + AHEAD_X) * 16 * PER
                inputs = inputs + (load_inputs(x_ptr + o_x, m_t, t_o + o_x, t_end, V, PER, CHANGED),)
            if step + AHEAD < STEPS:
                o_c = (step + AHEAD) * 16
                words = words + step_words(w_ptr + o_c, l_q, l_o[:, None] + o_c, l_end, Q, stride_w, V, TILES)
                if SCALED > 0:
                    scales = scales + step_scales(
                        ws_ptr, o_si, o_j + o_c, o_q, columns, Q, stride_sq, PER, SCALED, TILES
                    )
            b_xs = input_places(inputs[step], FORM, PER)
            sums = ()
            for tile in tl.static_range(TILES):
                b = tl.zeros((BJ, 16, BT), tl.float32) if SCALED > 0 else accs[tile]
                b = step_sum(words[step * TILES + tile], b_xs, b, FORM, PER, V, PRECISION, CHANGED)
                if SCALED > 0:
                    b = accs[tile] + b * scales[step * TILES + tile].to(tl.float32)[:, :, None]
                sums = sums + (b,)
            accs = sums
    else:
        inputs = load_inputs(x_ptr, m_t, t_o, t_end, V, PER, CHANGED)
        for step in range(0, PART // 16):
            b_xs = input_places(inputs, FORM, PER)
            # what the next step takes is on its way while this one multiplies
            ahead = (step + 1) * 16
            inputs = load_inputs(x_ptr + ahead * PER, m_t, t_o + ahead * PER, t_end, V, PER, CHANGED)
            sums = ()
            next_words = ()
            for tile in tl.static_range(TILES):
                rows, next_ptr = l_q + tile * 16, w_ptr + tile * 16 * stride_w + ahead
                next_words = next_words + step_words(next_ptr, rows, l_o[:, None] + ahead, l_end, Q, stride_w, V, 1)
                b = tl.zeros((BJ, 16, BT), tl.float32) if SCALED > 0 else accs[tile]
                b = step_sum(words[tile], b_xs, b, FORM, PER, V, PRECISION, CHANGED)
                if SCALED > 0:
                    b_s = step_scales(
                        ws_ptr, o_si, o_j + step * 16, o_q + tile * 16, columns, Q, stride_sq, PER, SCALED, 1
                    )
                    b = accs[tile] + b * b_s[0].to(tl.float32)[:, :, None]
                sums = sums + (b,)
            accs = sums
            words = next_words
    out_ptr += i_s.to(tl.int64) * stride_os
    for tile in tl.static_range(TILES):
        put_rows(
            accs[tile],
            ws_ptr,
            bias_ptr,
            out_ptr,
            o_si,
            o_q + tile * 16,
            i_i,
            T,
            Q,
            GROUP,
            GATED_BLOCKS,
            stride_og,
            stride_ot,
            stride_sq,
            HAS_BIAS,
            ACTIVATION,
            GATED,
            ADD,
            SCALED,
        )
