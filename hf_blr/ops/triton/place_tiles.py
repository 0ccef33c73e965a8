"""Tiles of words and of inputs for `decode_places`, loaded into the registers that tensor cores take them from.

Of a tile of 16 words, lane t of four has what a product takes from it: two words, and two more. A thread loads them at
once, 16 bytes or 8 if rows begin there. Which of the words these are is free, as long as inputs come in the same order.
The rows of a load are (eight rows of sixteen, warp, row), so that each warp loads what it multiplies. Triton lays a
load out so that threads read 16 bytes each, four threads a row, and nothing changes places after that; a compiler that
lays out otherwise gives the same sums.

Inputs of a lane's four words of int4 are 64 bytes. The 16 of them that lanes 0 and 2 load at once lie in the same banks
of the first cache, as do those of 1 and 3. CHANGED: lanes 2 and 3 take the words of each pair in the other order, which
unpacking undoes at no cost.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hf_blr.ops.triton.bits import by_place


@triton.jit
def word_of(lane, a, b, V: tl.constexpr, CHANGED: tl.constexpr):
    """Which of 16 words is the pair's b of the lane's pair a, where a thread loads V words at once."""
    if V == 4:
        word = 4 * lane + 2 * a + (b ^ (lane // 2) if CHANGED else b)
    elif V == 2:
        word = 8 * b + 2 * lane + a
    else:
        word = 4 * (2 * a + b) + lane
    return word


@triton.jit
def load_words(ptr, m, o_c, end, V: tl.constexpr):
    """Tiles `[rows, 4 * V]`, 4 / V of them, of the 16 words at ptr, which are those from o_c on of a row that ends."""
    tiles = ()
    for i in tl.static_range(0, 16, 4 * V):
        o = i + tl.arange(0, 4 * V)[None, :]
        tiles = tiles + (tl.load(ptr + o, mask=m & (o_c + o < end), other=0, eviction_policy="evict_first"),)
    return tiles


@triton.jit
def words_in_order(tiles, V: tl.constexpr):
    """`[rows, 16]`: (lane, a, b) of `word_of`."""
    R: tl.constexpr = tiles[0].shape[0]
    if V == 4:
        b = tiles[0]
    elif V == 2:
        b = tl.join(tl.reshape(tiles[0], (R, 4, 2)), tl.reshape(tiles[1], (R, 4, 2)))
    else:
        b = tl.join(tl.join(tiles[0], tiles[2]), tl.join(tiles[1], tiles[3]))
    return tl.reshape(b, (R, 16))


@triton.jit
def load_inputs(ptr, m, o_r, end, V: tl.constexpr, PER: tl.constexpr, CHANGED: tl.constexpr):
    """Four tiles `[rows, 4 * PER]`, of (a, b) 00, 01, 10 and 11: the inputs that meet the words of `load_words`."""
    o_n = tl.arange(0, 4 * PER)
    tiles = ()
    for i in tl.static_range(4):
        o = (word_of(o_n // PER, i // 2, i % 2, V, CHANGED) * PER + o_n % PER)[None, :]
        tiles = tiles + (tl.load(ptr + o, mask=m & (o_r + o < end), other=0.0),)
    return tiles


@triton.jit
def input_places(tiles, FORM: tl.constexpr, PER: tl.constexpr):
    """PER tiles `[rows, 16]`: the inputs that meet number 0, 1, ... of the words of `words_in_order`."""
    R: tl.constexpr = tiles[0].shape[0]
    b_00 = by_place(tl.reshape(tiles[0], (1, R, 4 * PER)), FORM)
    b_01 = by_place(tl.reshape(tiles[1], (1, R, 4 * PER)), FORM)
    b_10 = by_place(tl.reshape(tiles[2], (1, R, 4 * PER)), FORM)
    b_11 = by_place(tl.reshape(tiles[3], (1, R, 4 * PER)), FORM)
    found = ()
    for j in tl.static_range(PER):
        b_j = tl.join(tl.join(b_00[j], b_10[j]), tl.join(b_01[j], b_11[j]))
        found = found + (tl.reshape(b_j, (R, 16)),)
    return found


@triton.jit
def by_warp(b, BJ: tl.constexpr):
    """Rows (eights, warp, row) `[BJ * N, C]` as `[BJ, N, C]`."""
    N: tl.constexpr = b.shape[0] // BJ
    C: tl.constexpr = b.shape[1]
    return tl.reshape(tl.permute(tl.reshape(b, (N // 8, BJ, 8, C)), (1, 0, 2, 3)), (BJ, N, C))


@triton.jit
def warp_and_row(o, BJ: tl.constexpr):
    """(warp, row) of place o in the rows of a load."""
    return o // 8 % BJ, o // (8 * BJ) * 8 + o % 8
