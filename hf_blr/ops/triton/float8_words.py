"""Words of four numbers of float8, and registers of two of float16: what Triton has no types for, in assembler.

Words stay words from load to store: Triton keeps each byte that a loop carries in a register of its own. The
interpreter, which has no assembler, computes the same in plain operations.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hf_blr.ops.triton.pairs import ASSEMBLES

#: $0 and $1: numbers 0 and 1, and 2 and 3, of a word $2
HALVES = tl.constexpr("{ .reg .b16 a, b; mov.b32 {a, b}, $2; cvt.rn.f16x2.e4m3x2 $0, a; cvt.rn.f16x2.e4m3x2 $1, b; }")
#: the word of the numbers of $1 and $2
WORD = tl.constexpr(
    "{ .reg .b16 a, b; cvt.rn.satfinite.e4m3x2.f16x2 a, $1; cvt.rn.satfinite.e4m3x2.f16x2 b, $2; mov.b32 $0, {a, b}; }"
)
FMA = tl.constexpr("fma.rn.f16x2 $0, $1, $2, $3;")


@triton.jit
def halves_of_words(b_w):
    """Two int32, each of two float16: the numbers of words of float8, int32."""
    if ASSEMBLES:
        b_low, b_high = tl.inline_asm_elementwise(
            HALVES, "=r,=r,r", [b_w], dtype=(tl.int32, tl.int32), is_pure=True, pack=1
        )
    else:
        b_low = pair_of(half_of_byte(b_w), half_of_byte(b_w >> 8))
        b_high = pair_of(half_of_byte(b_w >> 16), half_of_byte(b_w >> 24))
    return b_low, b_high


@triton.jit
def words_of_halves(b_low, b_high):
    """Words of float8, to nearest, of what `halves_of_words` gives; none may exceed what float8 holds."""
    if ASSEMBLES:
        b_w = tl.inline_asm_elementwise(WORD, "=r,r,r", [b_low, b_high], dtype=tl.int32, is_pure=True, pack=1)
    else:
        b_w = byte_of_half(b_low) | (byte_of_half(b_low >> 16) << 8)
        b_w |= (byte_of_half(b_high) << 16) | (byte_of_half(b_high >> 16) << 24)
    return b_w


@triton.jit
def fma_of_halves(b_a, b_b, b_c):
    """a b + c, of two float16 in each int32."""
    if ASSEMBLES:
        b = tl.inline_asm_elementwise(FMA, "=r,r,r,r", [b_a, b_b, b_c], dtype=tl.int32, is_pure=True, pack=1)
    else:
        b_low = tl.fma(half_of(b_a), half_of(b_b), half_of(b_c))
        b = pair_of(b_low, tl.fma(half_of(b_a >> 16), half_of(b_b >> 16), half_of(b_c >> 16)))
    return b


@triton.jit
def half_of(b):
    """The float16 in the lower half of int32."""
    return (b & 0xFFFF).to(tl.uint16).to(tl.float16, bitcast=True)


@triton.jit
def pair_of(b_low, b_high):
    """int32 of two float16."""
    b = b_high.to(tl.uint16, bitcast=True).to(tl.int32) << 16
    return b | b_low.to(tl.uint16, bitcast=True).to(tl.int32)


@triton.jit
def half_of_byte(b):
    """float16 of the lowest byte of int32, of float8."""
    return (b & 0xFF).to(tl.uint8).to(tl.float8e4nv, bitcast=True).to(tl.float16)


@triton.jit
def byte_of_half(b):
    """int32 of the byte of float8 nearest to the lower half, of float16."""
    return half_of(b).to(tl.float8e4nv).to(tl.uint8, bitcast=True).to(tl.int32)
