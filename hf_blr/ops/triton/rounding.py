"""Columns that are rounded one after the other, each when those before it have moved it: see `factorize.columns`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

#: rows of a program, which is one warp: what a row waits for is the columns before, and all rows wait side by side
ROWS = 8
#: columns that a program holds. Blocks are no wider, and what is narrower is masked: the last block of each rank would
#: be a kernel of its own otherwise, and compiling it takes longer than it runs
COLUMNS = 128


@triton.jit
def nearest_code(b_x, lowest, highest, FLOAT8: tl.constexpr):
    """The nearest code to each value in float32, of ties the even one."""
    b_x = tl.minimum(tl.maximum(b_x, lowest), highest)
    # a sum with it has no bits left behind those of a code
    SMALL: tl.constexpr = 1.5 * 2**14 if FLOAT8 else 1.5 * 2**23
    b_code = (b_x + SMALL) - SMALL
    if FLOAT8:
        # cards before 8.9 have no conversion to e4m3: three bits of the mantissa stay, but for numbers below 2^-6
        b_bits = b_x.to(tl.int32, bitcast=True)
        b_bits = (b_bits + 0x7FFFF + ((b_bits >> 20) & 1)) & ~0xFFFFF
        b_code = tl.where(tl.abs(b_x) < 2.0**-6, b_code, b_bits.to(tl.float32, bitcast=True))
    return b_code


@triton.jit
def nearest_scale(b_x):
    """The nearest positive bfloat16 number to each value in float32, of ties the even one; in float32."""
    b_bits = tl.maximum(b_x, 2.0**-126).to(tl.int32, bitcast=True)
    return ((b_bits + 0x7FFF + ((b_bits >> 16) & 1)) & ~0xFFFF).to(tl.float32, bitcast=True)


@triton.jit
def best_scale(b_left, inside, fractions_ptr, tries, lowest, highest, FLOAT8: tl.constexpr):
    """The scale `[BN]` of least squared error for the columns of b_left `[BN, BM]` that are inside."""
    b_high = tl.max(tl.where(inside, b_left, -float("inf")), 1)
    b_low = tl.min(tl.where(inside, b_left, float("inf")), 1)
    b_full = tl.maximum(b_high / highest, b_low / lowest)
    # a group of zeros takes any scale
    b_full = tl.where(b_full > 0, b_full, 1.0)
    b_best = nearest_scale(b_full)
    b_least = tl.full(b_full.shape, float("inf"), tl.float32)
    for i in range(tries):
        b_scale = nearest_scale(tl.load(fractions_ptr + i) * b_full)
        b_wide = b_scale[:, None]
        b_off = nearest_code(b_left / b_wide, lowest, highest, FLOAT8) * b_wide - b_left
        b_error = tl.sum(tl.where(inside, b_off * b_off, 0.0), 1)
        b_best = tl.where(b_error < b_least, b_scale, b_best)
        b_least = tl.minimum(b_error, b_least)
    return b_best


# one kernel for all formats of integers, and for all numbers of rows and columns: a budget of bits tries them all
@triton.jit(do_not_specialize=["n", "m", "size", "tries"])
def round_columns_kernel(
    columns_ptr,
    upper_ptr,
    fractions_ptr,
    numbers_ptr,
    errors_ptr,
    scale_ptr,
    n,
    m,
    size,
    tries,
    lowest,
    highest,
    CHOOSES: tl.constexpr,
    FLOAT8: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """numbers and errors `[B, n, m]` of columns `[B, n, m]`, with upper `[B, m, m]` and scale `[B, n, m / size]`; all
    contiguous.
    """
    i_b = tl.program_id(1).to(tl.int64)
    o_n = tl.program_id(0) * BN + tl.arange(0, BN)
    o_m = tl.arange(0, BM)
    rows = i_b * n + o_n
    there = o_n < n
    places = rows[:, None] * m + o_m[None, :]
    inside = there[:, None] & (o_m < m)[None, :]
    b_left = tl.load(columns_ptr + places, mask=inside, other=0.0)
    upper_ptr += i_b * m * m
    groups = m // size
    for g in range(groups):
        if CHOOSES:
            of_group = (o_m // size == g)[None, :] & inside
            b_scale = best_scale(b_left, of_group, fractions_ptr, tries, lowest, highest, FLOAT8)
            tl.store(scale_ptr + rows * groups + g, b_scale, mask=there)
        else:
            b_scale = tl.load(scale_ptr + rows * groups + g, mask=there, other=1.0)
        for i in range(g * size, g * size + size):
            b_upper = tl.load(upper_ptr + i * m + o_m, mask=(o_m >= i) & (o_m < m), other=0.0)
            b_column = tl.sum(tl.where((o_m == i)[None, :], b_left, 0.0), 1)
            b_error = b_column - nearest_code(b_column / b_scale, lowest, highest, FLOAT8) * b_scale
            b_left -= b_error[:, None] * b_upper[None, :]
            tl.store(errors_ptr + rows * m + i, b_error, mask=there)
    tl.store(numbers_ptr + places, b_left, mask=inside)


def round_columns(columns, upper, lowest, highest, float8, size, fractions, scale=None):
    """(numbers, errors, scale) of columns `[..., n, m]` float32; see `factorize.columns.round_columns`.

    Args:
        size: of groups, where scales are chosen.
        fractions: that are tried then, float32.
    """
    columns, upper = columns.contiguous(), upper.contiguous()
    n, m = columns.shape[-2:]
    chooses, size = scale is None, size if scale is None else m
    numbers, errors = columns.new_empty(columns.shape), columns.new_empty(columns.shape)
    held = columns.new_empty(*columns.shape[:-1], m // size) if chooses else scale.float().contiguous()
    if not columns.numel():
        return numbers, errors, held.to(torch.bfloat16)
    grid = triton.cdiv(n, ROWS), columns.numel() // (n * m)
    round_columns_kernel[grid](
        columns,
        upper,
        fractions,
        numbers,
        errors,
        held,
        n,
        m,
        size,
        len(fractions),
        float(lowest),
        float(highest),
        CHOOSES=chooses,
        FLOAT8=float8,
        BM=max(COLUMNS, triton.next_power_of_2(m)),
        BN=ROWS,
        num_warps=1,
    )
    return numbers, errors, held.to(torch.bfloat16) if chooses else scale
