"""Casts of a training step to float8 (e4m3), by rows, by columns or both, and transposes of codes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hf_blr.ops.cast import FLOAT8, LARGEST, SMALLEST_NORM, plain_cast


class Rows(NamedTuple):
    """A matrix `[M, L]`: codes `[M, L]` float8_e4m3fn times scale `[M]` float32."""

    codes: Tensor
    scale: Tensor


def cast(t: Tensor, emulated: bool, factors: Sequence[Tensor] = (), outer: Tensor | None = None) -> Rows:
    """The nearest numbers of float8 to t `[M, L]` times factors `[L]`, with a scale for each row; that times outer.

    With factors it is an operand and no more, whose rows lie as products read them fastest.
    """
    if emulated:
        return scaled_by(outer, *plain_cast(multiplied(t, factors)))
    from hf_blr.ops.triton.cast import cast_rows

    return Rows(*cast_rows(by_rows(t), LARGEST, SMALLEST_NORM, factors, outer, rooms=bool(factors)))


def cast_stacked(parts: Sequence[Tensor], emulated: bool) -> Rows:
    """`cast` of matrices `[M_i, L]` under each other."""
    if emulated:
        return cast(torch.cat(list(parts)), emulated)
    from hf_blr.ops.triton.cast import cast_rows

    sizes, like = [len(part) for part in parts], parts[0]
    codes = like.new_empty(sum(sizes), like.shape[1], dtype=FLOAT8)
    scale = like.new_empty(sum(sizes), dtype=torch.float32)
    for part, *into in zip(parts, codes.split(sizes), scale.split(sizes), strict=True):
        cast_rows(by_rows(part), LARGEST, SMALLEST_NORM, into=into)
    return Rows(codes, scale)


def cast_columns(t: Tensor, emulated: bool, factors: Sequence[Tensor] = (), outer: Tensor | None = None) -> Rows:
    """`cast` of the transpose `[L, M]` of t `[M, L]`: factors `[M]`, outer `[L]`."""
    if emulated:
        codes, scale = plain_cast(multiplied(t.T, factors))
        # they come as t lies
        return scaled_by(outer, codes.contiguous(), scale)
    from hf_blr.ops.triton.cast_columns import cast_columns

    return Rows(*cast_columns(by_rows(t), LARGEST, SMALLEST_NORM, factors, outer))


def multiplied(t: Tensor, factors: Sequence[Tensor]) -> Tensor:
    for factor in factors:
        t = t.float() * factor
    return t


def scaled_by(outer: Tensor | None, codes: Tensor, scale: Tensor) -> Rows:
    return Rows(codes, scale if outer is None else scale * outer)


def cast_both(t: Tensor, emulated: bool) -> tuple[Rows, Rows]:
    """(`cast_columns` of t `[M, L]`, the same codes `[M, L]`, whose scale the other operand takes)."""
    if emulated:
        columns = cast_columns(t, emulated)
        return columns, transposed(columns.codes, emulated)
    from hf_blr.ops.triton.cast_columns import cast_both

    columns, rows = cast_both(t.contiguous(), LARGEST, SMALLEST_NORM)
    return Rows(*columns), Rows(*rows)


def transposed(codes: Tensor, emulated: bool, rooms: bool = True) -> Rows:
    """`[L, M]` of codes `[M, L]`, whose scale the other operand has taken.

    rooms: the rows lie as products read them fastest, and not without gaps.
    """
    if emulated:
        return Rows(codes.T.contiguous(), codes.new_ones(codes.shape[1], dtype=torch.float32))
    from hf_blr.ops.triton.cast_columns import transposed_codes

    return Rows(*transposed_codes(codes.contiguous(), rooms))


def transpose_fake(codes: Tensor, emulated: bool) -> tuple[Tensor, Tensor]:
    return codes.new_empty(codes.shape[::-1]), codes.new_empty(codes.shape[1], dtype=torch.float32)


def by_rows(t: Tensor) -> Tensor:
    """t with contiguous rows, which may lie apart."""
    return t if t.stride(-1) == 1 else t.contiguous()
