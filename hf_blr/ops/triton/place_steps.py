"""What a step of `decode_places` loads and multiplies: of a part of each row 16 words, which lie in one group."""

from __future__ import annotations

import triton
import triton.language as tl

from hf_blr.ops.triton.bits import places_of
from hf_blr.ops.triton.place_tiles import by_warp, load_words, words_in_order


@triton.jit
def step_words(ptr, o_q, o_c, end, Q, stride, V: tl.constexpr, TILES: tl.constexpr):
    """For each tile of 16 rows, stride words apart, the 16 words at ptr, as `load_words` has them."""
    words = ()
    for tile in tl.static_range(TILES):
        m = (o_q + tile * 16 < Q)[:, None]
        words = words + (load_words(ptr + tile * 16 * stride, m, o_c, end, V),)
    return words


@triton.jit
def step_scales(ptr, o_i, o_c, o_q, columns, Q, stride, PER: tl.constexpr, SCALED: tl.constexpr, TILES: tl.constexpr):
    """For each tile of 16 rows of matrices at ptr + o_i, scales `[BJ, 16]` of the groups of the words from o_c on."""
    o_s = o_i + o_c * PER // SCALED
    scales = ()
    for tile in tl.static_range(TILES):
        o_n = o_q + tile * 16
        m = (o_c < columns)[:, None] & (o_n < Q)[None, :]
        scales = scales + (tl.load(ptr + (o_s[:, None] + (o_n * stride)[None, :]), mask=m, other=0.0),)
    return scales


@triton.jit
def step_sum(
    words,
    b_xs,
    acc,
    FORM: tl.constexpr,
    PER: tl.constexpr,
    V: tl.constexpr,
    PRECISION: tl.constexpr,
    CHANGED: tl.constexpr,
):
    """acc `[BJ, 16, BT]` plus the numbers of a tile's words, without scales, times the inputs of `input_places`."""
    BJ: tl.constexpr = acc.shape[0]
    b_w = by_warp(words_in_order(words, V), BJ)
    b_ws = places_of(b_w, FORM, PER, b_xs[0].dtype, CHANGED)
    for j in tl.static_range(PER):
        b_x = tl.permute(by_warp(b_xs[j], BJ), (0, 2, 1))
        acc = tl.dot(b_ws[j], b_x, acc, input_precision=PRECISION)
    return acc
