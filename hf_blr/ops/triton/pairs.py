"""Numbers of 16 bits from words in bits, two at a time: what Triton has no operations for, in assembler.

Numbers of one place of two words share a register. An instruction then serves two numbers, where float32 takes one each
and one more to round.
"""

from __future__ import annotations

import os

import triton
import triton.language as tl

#: the interpreter has no assembler
ASSEMBLES = tl.constexpr(os.environ.get("TRITON_INTERPRET") != "1")


def int4_pairs(kind: str, one: int, magic: int, offset: int) -> str:
    """Numbers 0 to 7 of words $8 and $9: four bits go into the mantissa of `magic`, of which `offset` is taken off.

    $10 says which word's numbers come first: 0x5410 or, the words having changed places, 0x1054.

    Args:
        kind: of the numbers in PTX.
        one, magic, offset: the bits of 1, of a power of two whose last place is 1, and of -(magic + 8), each twice.
    """
    lines = [
        f".reg .b32 low, high, t, up, one, offset; mov.b32 one, {one:#x}; mov.b32 offset, {offset:#x};",
        "add.u32 up, $10, 0x2222; prmt.b32 low, $8, $9, $10; prmt.b32 high, $8, $9, up;",
    ]
    for j in range(8):
        half, shift = "high" if j >= 4 else "low", 4 * (j % 4)
        # (bits & mask) | magic
        lines.append(f"shr.b32 t, {half}, {shift}; lop3.b32 t, t, 0x000F000F, {magic:#x}, 0xEA;")
        lines.append(f"fma.rn.{kind} ${j}, t, one, offset;")
    return "{ " + " ".join(lines) + " }"


def int8_pairs(kind: str, one: int, magic: int, mask: int, offset: int) -> str:
    """Numbers 0 to 3 of words $4 and $5: the bits under `mask` go into the mantissa of `magic`, and `offset` is added.

    Args:
        kind: of the numbers in PTX.
        one, magic: as of `int4_pairs`.
        mask: of seven or eight bits, twice. Where it has seven, the eighth bit halves `offset`.
        offset: the bits of a negative number, twice.
    """
    lines = [f".reg .b32 t, n, one, offset; mov.b32 one, {one:#x}; mov.b32 offset, {offset:#x};"]
    for j in range(4):
        # byte j of both words, each twice, of which the masks drop one; then (bits & mask) | magic
        lines.append(f"prmt.b32 t, $4, $5, {0x11 * j + 0x1100 * (4 + j):#x};")
        lines.append(f"lop3.b32 n, t, {mask:#x}, {magic:#x}, 0xEA;")
        # (bits & eighth) ^ offset
        lines.append(f"lop3.b32 t, t, {~mask & 0x00FF00FF:#x}, offset, 0x6A; fma.rn.{kind} ${j}, n, one, t;")
    return "{ " + " ".join(lines) + " }"


def float8_pairs(kind: str, times: int, factor: int) -> str:
    """Numbers 0 to 3 of words $4 and $5: the bits of e4m3 as a wider number's, times what the exponents differ by.

    A product moves the bits, as shifts share their unit with all that masks.

    Args:
        kind: of the numbers in PTX.
        times: the power of two by which the bits below the sign come to their place.
        factor: the bits of the power of two that exponents differ by, twice.
    """
    lines = [f".reg .b32 t, m, factor, zero; mov.b32 factor, {factor:#x}; mov.b32 zero, 0x80008000;"]
    for j in range(4):
        # byte j of both words, each twice: the higher has the sign; then (t & sign) | m
        lines.append(f"prmt.b32 t, $4, $5, {0x11 * j + 0x1100 * (4 + j):#x};")
        lines.append(f"and.b32 m, t, 0x007F007F; mul.lo.u32 m, m, {times};")
        lines.append("lop3.b32 t, t, 0x80008000, m, 0xEA;")
        lines.append(f"fma.rn.{kind} ${j}, t, factor, zero;")
    return "{ " + " ".join(lines) + " }"


INT4_BF16 = tl.constexpr(int4_pairs("bf16x2", 0x3F803F80, 0x43004300, 0xC308C308))
INT4_FP16 = tl.constexpr(int4_pairs("f16x2", 0x3C003C00, 0x64006400, 0xE408E408))
INT8_BF16 = tl.constexpr(int8_pairs("bf16x2", 0x3F803F80, 0x43004300, 0x007F007F, 0xC380C380))
INT8_FP16 = tl.constexpr(int8_pairs("f16x2", 0x3C003C00, 0x64006400, 0x00FF00FF, 0xE480E480))
FLOAT8_BF16 = tl.constexpr(float8_pairs("bf16x2", 16, 0x7B807B80))
FLOAT8_FP16 = tl.constexpr(float8_pairs("f16x2", 128, 0x5C005C00))


@triton.jit
def int4_places(b_w, b_first, DTYPE: tl.constexpr):
    """Eight tiles like b_w: number 0, 1, ... of each word, in float16 or bfloat16; b_first is $10 of `int4_pairs`."""
    ASM: tl.constexpr = INT4_BF16 if tl.bfloat16 == DTYPE else INT4_FP16
    b_0, b_1, b_2, b_3, b_4, b_5, b_6, b_7 = tl.inline_asm_elementwise(
        ASM, "=r,=r,=r,=r,=r,=r,=r,=r,r,r,r,r", [b_w, b_first], [tl.int16] * 8, is_pure=True, pack=2
    )
    return (
        b_0.to(DTYPE, bitcast=True),
        b_1.to(DTYPE, bitcast=True),
        b_2.to(DTYPE, bitcast=True),
        b_3.to(DTYPE, bitcast=True),
        b_4.to(DTYPE, bitcast=True),
        b_5.to(DTYPE, bitcast=True),
        b_6.to(DTYPE, bitcast=True),
        b_7.to(DTYPE, bitcast=True),
    )


@triton.jit
def byte_places(b_w, FORM: tl.constexpr, DTYPE: tl.constexpr):
    """Four tiles like b_w: number 0, 1, ... of each word, in float16 or bfloat16."""
    if FORM == "int8":
        ASM: tl.constexpr = INT8_BF16 if tl.bfloat16 == DTYPE else INT8_FP16
    else:
        ASM: tl.constexpr = FLOAT8_BF16 if tl.bfloat16 == DTYPE else FLOAT8_FP16
    b_0, b_1, b_2, b_3 = tl.inline_asm_elementwise(ASM, "=r,=r,=r,=r,r,r", [b_w], [tl.int16] * 4, is_pure=True, pack=2)
    return (
        b_0.to(DTYPE, bitcast=True),
        b_1.to(DTYPE, bitcast=True),
        b_2.to(DTYPE, bitcast=True),
        b_3.to(DTYPE, bitcast=True),
    )
