"""Rows of a matrix and what they are multiplied by, as the kernels of one token hold them in registers.

A row is read in whole steps, of which nothing is masked, and perhaps in one that ends where the row does. Rows behind
the last are the last again. Loads have no cache policy: five instructions in a chain would make it anew for each.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hf_blr.ops.triton.bits import by_place, sum_of_columns
from hf_blr.ops.triton.halves import paired


@triton.jit
def places_of_rows(i_q, LAYERS: tl.constexpr, BX: tl.constexpr, BQ: tl.constexpr):
    """`[BQ]`: the rows of tile i_q, which the warps hold BX side by side, equal ones of each layer."""
    o_q = tl.arange(0, BQ)
    if LAYERS > 1:
        o_q = o_q // BX * (BX // LAYERS) + o_q % (BX // LAYERS)
    return i_q * (BQ // LAYERS) + o_q


@triton.jit
def layers_apart(distance, LAYERS: tl.constexpr, BX: tl.constexpr, BQ: tl.constexpr):
    """`[BQ]`: how far the rows of a tile lie from those of the first layer, `distance` from layer to layer."""
    return tl.arange(0, BQ) // (BX // LAYERS) % LAYERS * distance


@triton.jit
def rows_of(
    w_ptr,
    i_q,
    Q,
    C,
    stride_wl,
    stride_wq,
    WHOLE: tl.constexpr,
    STEPS: tl.constexpr,
    TAIL: tl.constexpr,
    LAYERS: tl.constexpr,
    BX: tl.constexpr,
    BQ: tl.constexpr,
    BC: tl.constexpr,
):
    """Tile i_q of LAYERS matrices `[Q, C]` in STEPS pieces `[BQ, BC]` and, if TAIL > 0, one of TAIL columns.

    WHOLE of the steps end within the row; behind C is zero.
    """
    o_q = tl.minimum(places_of_rows(i_q, LAYERS, BX, BQ), Q - 1)
    # steps are distances that a load's own offset holds
    row_ptr = w_ptr + o_q[:, None] * stride_wq
    if LAYERS > 1:
        row_ptr += layers_apart(stride_wl, LAYERS, BX, BQ)[:, None]
    pieces = ()
    for step in tl.static_range(STEPS):
        o_c = step * BC + tl.arange(0, BC)
        if step < WHOLE:
            pieces = pieces + (tl.load(row_ptr + o_c[None, :]),)
        else:
            pieces = pieces + (tl.load(row_ptr + o_c[None, :], mask=(o_c < C)[None, :], other=0),)
    if TAIL > 0:
        o_c = STEPS * BC + tl.arange(0, TAIL)
        pieces = pieces + (tl.load(row_ptr + o_c[None, :], mask=(o_c < C)[None, :], other=0),)
    return pieces


@triton.jit
def scales_of_columns(
    row_ptr, FIRST: tl.constexpr, C, WITHIN: tl.constexpr, PER: tl.constexpr, GROUP: tl.constexpr, BC: tl.constexpr
):
    """The scales of columns FIRST to FIRST + BC of rows `[BQ, 1]`; if not WITHIN, behind C its last column's."""
    if BC * PER % GROUP == 0:
        # a load so small that Triton lets each thread have what it uses
        GROUPS: tl.constexpr = BC * PER // GROUP
        o_g = FIRST * PER // GROUP + tl.arange(0, GROUPS)
        if not WITHIN:
            o_g = tl.minimum(o_g, (C - 1) * PER // GROUP)
        b_s = tl.load(row_ptr + o_g[None, :])[:, :, None]
        b_s = tl.broadcast_to(b_s, (b_s.shape[0], GROUPS, BC // GROUPS))
        b = tl.reshape(b_s, (b_s.shape[0], BC))
    else:
        o_c = FIRST + tl.arange(0, BC)
        if not WITHIN:
            o_c = tl.minimum(o_c, C - 1)
        b = tl.load(row_ptr + (o_c * PER // GROUP)[None, :])
    return b


@triton.jit
def scales_of(
    s_ptr,
    i_q,
    Q,
    C,
    stride_sl,
    stride_sq,
    PER: tl.constexpr,
    GROUP: tl.constexpr,
    WHOLE: tl.constexpr,
    STEPS: tl.constexpr,
    TAIL: tl.constexpr,
    LAYERS: tl.constexpr,
    BX: tl.constexpr,
    BQ: tl.constexpr,
    BC: tl.constexpr,
):
    """Of the same tile: the scale of each column in pieces like the tile's, or of each row."""
    o_q = tl.minimum(places_of_rows(i_q, LAYERS, BX, BQ), Q - 1)
    o_s = o_q * stride_sq
    if LAYERS > 1:
        o_s += layers_apart(stride_sl, LAYERS, BX, BQ)
    pieces = ()
    if GROUP == 0:
        pieces = pieces + (tl.load(s_ptr + o_s),)
    else:
        row_ptr = s_ptr + o_s[:, None]
        for step in tl.static_range(STEPS):
            pieces = pieces + (scales_of_columns(row_ptr, step * BC, C, step < WHOLE, PER, GROUP, BC),)
        if TAIL > 0:
            pieces = pieces + (scales_of_columns(row_ptr, STEPS * BC, C, False, PER, GROUP, TAIL),)
    return pieces


@triton.jit
def vector_of(
    x_ptr,
    R,
    FIRST,
    stride_xl,
    CACHE: tl.constexpr,
    FORM: tl.constexpr,
    PER: tl.constexpr,
    STEPS: tl.constexpr,
    LAYERS: tl.constexpr,
    BX: tl.constexpr,
    BQ: tl.constexpr,
    BC: tl.constexpr,
):
    """What `paired` makes of each layer's x `[R]` in STEPS pieces `[BQ, BC]` of columns from FIRST on.

    Each warp loads what it needs, by the caches that CACHE says, and asks no other. It holds a number once for all its
    rows.
    """
    tiles = ()
    for step in tl.static_range(STEPS):
        o_r = (FIRST + step * BC) * PER + tl.arange(0, BC * PER)
        o_r = tl.broadcast_to(o_r[None, None, :], (1, BX, BC * PER))
        o_x = o_r
        if LAYERS > 1:
            o_x += layers_apart(stride_xl, LAYERS, BX, BX)[None, :, None]
        tiles = tiles + by_place(tl.load(x_ptr + o_x, mask=o_r < R, other=0.0, cache_modifier=CACHE), FORM)
    tiles = paired(tiles, 0, STEPS, FORM, PER)
    pieces = ()
    for i in tl.static_range(len(tiles)):
        pieces = pieces + (tl.reshape(tl.broadcast_to(tiles[i], (BQ // BX, BX, BC)), (BQ, BC)),)
    return pieces


@triton.jit
def product_of(
    b_xs,
    b_ts,
    b_ws,
    b_ss,
    bias_ptr,
    o_n,
    m_q,
    FORM: tl.constexpr,
    PER: tl.constexpr,
    GROUP: tl.constexpr,
    STEPS: tl.constexpr,
    TAIL: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    """`[BQ]`: the rows times the vector, b_xs and of the tail b_ts, plus the bias."""
    b_out = tl.sum(sum_of_columns(b_xs, b_ws, b_ss, 0, STEPS, FORM, PER, GROUP), 1)
    if TAIL > 0:
        b_out += tl.sum(sum_of_columns(b_ts, b_ws, b_ss, STEPS, 1, FORM, PER, GROUP), 1)
    if FORM != "plain" and GROUP == 0:
        b_out *= b_ss[0].to(tl.float32)
    if HAS_BIAS:
        b_out += tl.load(bias_ptr + o_n, mask=m_q, other=0.0).to(tl.float32)
    return b_out
