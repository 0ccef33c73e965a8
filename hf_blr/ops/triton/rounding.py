"""Columns that are rounded one after the other, each when those before it have moved it: see `factorize.columns`."""

from __future__ import annotations

import triton
import triton.language as tl

#: rows of a program, which is one warp: what a row waits for is the columns before, and all rows wait side by side
ROWS = 8


@triton.jit
def nearest_code(b_x, LOWEST: tl.constexpr, HIGHEST: tl.constexpr, FLOAT8: tl.constexpr):
    """The nearest code to each value in float32, of ties the even one."""
    b_x = tl.minimum(tl.maximum(b_x, LOWEST), HIGHEST)
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
def round_columns_kernel(
    columns_ptr,
    upper_ptr,
    errors_ptr,
    n,
    m,
    LOWEST: tl.constexpr,
    HIGHEST: tl.constexpr,
    FLOAT8: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """errors `[B, n, m]` of columns `[B, n, m]`, with upper `[B, m, m]`; all contiguous."""
    i_b = tl.program_id(1).to(tl.int64)
    o_n = tl.program_id(0) * BN + tl.arange(0, BN)
    o_m = tl.arange(0, BM)
    places = i_b * n * m + o_n[:, None] * m + o_m[None, :]
    inside = (o_n < n)[:, None] & (o_m < m)[None, :]
    b_left = tl.load(columns_ptr + places, mask=inside, other=0.0)
    upper_ptr += i_b * m * m
    for i in range(m):
        b_upper = tl.load(upper_ptr + i * m + o_m, mask=(o_m > i) & (o_m < m), other=0.0)
        b_column = tl.sum(tl.where((o_m == i)[None, :], b_left, 0.0), 1)
        b_error = b_column - nearest_code(b_column, LOWEST, HIGHEST, FLOAT8)
        b_left -= b_error[:, None] * b_upper[None, :]
    # no column has moved since it was rounded
    tl.store(errors_ptr + places, b_left - nearest_code(b_left, LOWEST, HIGHEST, FLOAT8), mask=inside)


def round_columns(columns, upper, lowest, highest, float8):
    """What columns `[..., n, m]` float32 are off their codes by; see `factorize.columns.round_columns`."""
    columns, upper = columns.contiguous(), upper.contiguous()
    errors = columns.new_empty(columns.shape)
    if not columns.numel():
        return errors
    n, m = columns.shape[-2:]
    grid = triton.cdiv(n, ROWS), columns.numel() // (n * m)
    round_columns_kernel[grid](
        columns,
        upper,
        errors,
        n,
        m,
        LOWEST=float(lowest),
        HIGHEST=float(highest),
        FLOAT8=float8,
        BM=triton.next_power_of_2(m),
        BN=ROWS,
        num_warps=1,
    )
    return errors
