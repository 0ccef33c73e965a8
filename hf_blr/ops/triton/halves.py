"""One token on words in bits: sums of products in float16, two at a time, by assembler, which Triton has nothing for.

A register holds two numbers of float16, so that an instruction serves both. x is scaled so that no sum of the few
products that stay in float16 overflows; those sums are added in float32.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hf_blr.ops.triton.pairs import ASSEMBLES

#: the exponent of x's largest number: of twice as many products as a word has in each half, none overflows
TOP_INT4, TOP_INT8, TOP_FP8 = tl.constexpr(8), tl.constexpr(5), tl.constexpr(4)


def of_int4(word: str, x: list[str]) -> str:
    """Adds numbers j and j + 4 of a word times pair j of x to `sum`."""
    # four bits in the mantissa of 1024 and, four bits higher, of 64; integers have an offset of 8
    even = "lop3.b32 t, {}, 0x000F000F, 0x64006400, 0xEA; mov.b32 c, 0xE408E408; add.rn.f16x2 t, t, c;"
    odd = "lop3.b32 t, {}, 0x00F000F0, 0x64006400, 0xEA; mov.b32 c, 0x2C002C00; mov.b32 d, 0xD480D480; "
    odd += "fma.rn.f16x2 t, t, c, d;"
    numbers = even.format(word), odd.format(word), f"shr.b32 h, {word}, 8; " + even.format("h"), odd.format("h")
    return " ".join(f"{number} {added(pair)}" for number, pair in zip(numbers, x, strict=True))


def of_int8(word: str, x: list[str]) -> str:
    """Adds numbers 2j and 2j + 1 of a word times pair j of x to `sum`."""
    # two bytes, each in the mantissa of 1024; integers have an offset of 128
    number = "prmt.b32 t, {}, 0x64646464, {}; mov.b32 c, 0xE480E480; add.rn.f16x2 t, t, c;"
    return " ".join(f"{number.format(word, b)} {added(pair)}" for b, pair in zip(("0x4140", "0x4342"), x, strict=True))


def of_fp8(word: str, x: list[str]) -> str:
    """As `of_int8`."""
    numbers = f"mov.b32 {{a, b}}, {word}; cvt.rn.f16x2.e4m3x2 t, a;", "cvt.rn.f16x2.e4m3x2 t, b;"
    return " ".join(f"{number} {added(pair)}" for number, pair in zip(numbers, x, strict=True))


def of_fp8_bits(word: str, x: list[str]) -> str:
    """As `of_int8`, where nothing converts float8: e4m3's exponent, of bias 7, as float16's, of bias 15."""
    number = "prmt.b32 t, {}, 0, {}; shr.b32 h, t, 1; and.b32 h, h, 0x3F803F80; mov.b32 c, 0x80008000; "
    number += "lop3.b32 t, t, c, h, 0xEA; mov.b32 c, 0x5C005C00; mul.rn.f16x2 t, t, c;"
    return " ".join(f"{number.format(word, b)} {added(pair)}" for b, pair in zip(("0x1404", "0x3424"), x, strict=True))


def added(pair: str) -> str:
    return f"fma.rn.f16x2 sum, t, {pair}, sum;"


#: {form: what adds the products of a word, and how many pairs of x it takes}
PRODUCTS = {"int4": (of_int4, 4), "int8": (of_int8, 2), "fp8": (of_fp8, 2), "fp8_bits": (of_fp8_bits, 2)}


def sum_program(form: str, words: int) -> str:
    """$0, in float32: the sum of the numbers of words $1, ... times those of x, whose pairs follow the words."""
    products, pairs = PRODUCTS[form]
    lines = [".reg .b32 t, h, c, d, sum; .reg .b16 a, b; .reg .f32 x, y; mov.b32 sum, 0;"]
    for i in range(words):
        first = 1 + words + pairs * i
        lines.append(products(f"${1 + i}", [f"${j}" for j in range(first, first + pairs)]))
    lines.append("mov.b32 {a, b}, sum; cvt.f32.f16 x, a; cvt.f32.f16 y, b; add.rn.f32 $0, x, y;")
    return "{ " + " ".join(lines) + " }"


#: $0: $1 in the lower half and $2 in the upper, in float16
PAIR = tl.constexpr("{ cvt.rn.f16x2.f32 $0, $2, $1; }")
INT4_1, INT4_2 = (tl.constexpr(sum_program("int4", n)) for n in (1, 2))
INT8_1, INT8_2 = (tl.constexpr(sum_program("int8", n)) for n in (1, 2))
FP8_1, FP8_2 = (tl.constexpr(sum_program("fp8", n)) for n in (1, 2))
FP8_BITS_1, FP8_BITS_2 = (tl.constexpr(sum_program("fp8_bits", n)) for n in (1, 2))


@triton.jit
def pair_of(b_x, b_y, b_in):
    """int32 of two float16: x times a power of two in the lower half, y in the upper."""
    return tl.inline_asm_elementwise(
        PAIR,
        "=r,f,f",
        [b_x.to(tl.float32) * b_in, b_y.to(tl.float32) * b_in],
        dtype=tl.int32,
        is_pure=True,
        pack=1,
    )


@triton.jit
def paired(b_xs, FIRST: tl.constexpr, COUNT: tl.constexpr, FORM: tl.constexpr, PER: tl.constexpr):
    """Of COUNT words' tiles of x from b_xs[FIRST * PER] on, each alike: their pairs, then what brings sums back.

    Where there is no assembler or x is in float32, the tiles as they are; of plain columns too.
    """
    if ASSEMBLES and FORM != "plain" and b_xs[FIRST * PER].dtype != tl.float32:
        b_max = tl.abs(b_xs[FIRST * PER].to(tl.float32))
        for i in tl.static_range(FIRST * PER + 1, (FIRST + COUNT) * PER):
            b_max = tl.maximum(b_max, tl.abs(b_xs[i].to(tl.float32)))
        TOP: tl.constexpr = TOP_INT4 if FORM == "int4" else TOP_INT8 if FORM == "int8" else TOP_FP8
        # the largest number's exponent becomes TOP; a scale is a normal number
        b_e = tl.maximum(b_max.to(tl.int32, bitcast=True) >> 23, TOP + 1)
        b_in = ((254 + TOP - b_e) << 23).to(tl.float32, bitcast=True)
        pieces = ()
        for i in tl.static_range(FIRST, FIRST + COUNT):
            if FORM == "int4":
                for j in tl.static_range(4):
                    pieces = pieces + (pair_of(b_xs[i * PER + j], b_xs[i * PER + j + 4], b_in),)
            else:
                for j in tl.static_range(2):
                    pieces = pieces + (pair_of(b_xs[i * PER + 2 * j], b_xs[i * PER + 2 * j + 1], b_in),)
        pieces = pieces + (((b_e - TOP) << 23).to(tl.float32, bitcast=True),)
    else:
        pieces = ()
        for i in tl.static_range(FIRST * PER, (FIRST + COUNT) * PER):
            pieces = pieces + (b_xs[i],)
    return pieces


@triton.jit
def sum_of_word(b_ps, i: tl.constexpr, b_w, FORM: tl.constexpr):
    """The numbers of words times those of x, from pair i on, in float32."""
    if FORM == "int4":
        b = tl.inline_asm_elementwise(
            INT4_1,
            "=r,r,r,r,r,r",
            [b_w, b_ps[i], b_ps[i + 1], b_ps[i + 2], b_ps[i + 3]],
            dtype=tl.float32,
            is_pure=True,
            pack=1,
        )
    else:
        ASM: tl.constexpr = INT8_1 if FORM == "int8" else FP8_1 if FORM == "fp8" else FP8_BITS_1
        b = tl.inline_asm_elementwise(
            ASM, "=r,r,r,r", [b_w, b_ps[i], b_ps[i + 1]], dtype=tl.float32, is_pure=True, pack=1
        )
    return b


@triton.jit
def sum_of_two_words(b_ps, i: tl.constexpr, b_v, b_w, FORM: tl.constexpr):
    """Of two tiles of words, whose pairs follow each other."""
    if FORM == "int4":
        b = tl.inline_asm_elementwise(
            INT4_2,
            "=r,r,r,r,r,r,r,r,r,r,r",
            [
                b_v,
                b_w,
                b_ps[i],
                b_ps[i + 1],
                b_ps[i + 2],
                b_ps[i + 3],
                b_ps[i + 4],
                b_ps[i + 5],
                b_ps[i + 6],
                b_ps[i + 7],
            ],
            dtype=tl.float32,
            is_pure=True,
            pack=1,
        )
    else:
        ASM: tl.constexpr = INT8_2 if FORM == "int8" else FP8_2 if FORM == "fp8" else FP8_BITS_2
        b = tl.inline_asm_elementwise(
            ASM,
            "=r,r,r,r,r,r,r",
            [b_v, b_w, b_ps[i], b_ps[i + 1], b_ps[i + 2], b_ps[i + 3]],
            dtype=tl.float32,
            is_pure=True,
            pack=1,
        )
    return b
