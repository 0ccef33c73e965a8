"""A block of columns rounded one after the other: the step of GPTQ that cannot be a product."""

from __future__ import annotations

from functools import cache
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from hf_blr.formats import Bits
from hf_blr.ops.dispatch import why_not_triton

#: columns of a block at most: all columns behind a block wait for it
BLOCK = 128
#: columns between two updates of the columns behind them in a block, where a column is some operations
STRIDE = 32


class Rounded(NamedTuple):
    """Columns `[..., n, m]` that have codes.

    numbers: what the codes stand for. errors: what each column was off that when its turn came. scale: `[..., n,
    groups]`, bfloat16.
    """

    numbers: Tensor
    errors: Tensor
    scale: Tensor


def column_blocks(k: int, size: int) -> list[tuple[int, int]]:
    """Columns 0 to k in blocks (first, end) that hold whole groups of this size, or lie in one."""
    bundle = size * max(1, BLOCK // size)
    bounds = {first for start in range(0, k, bundle) for first in range(start, min(start + bundle, k), BLOCK)}
    return list(pairwise(sorted(bounds | {k})))


def runs_kernel(columns: Tensor) -> bool:
    """Whether `round_columns` of such columns is one kernel. Float64 is not what a fit rounds in."""
    return columns.is_cuda and columns.dtype == torch.float32 and why_not_triton(columns, []) is None


def round_columns(columns: Tensor, upper: Tensor, storage: Bits, scale: Tensor | None = None) -> Rounded:
    """Rounds columns `[..., n, m]` one after the other, m at most `BLOCK`.

    A column is rounded when it has been moved for the columns before it, by their rows of `upper` `[..., m, m]`, whose
    diagonal is one.

    Args:
        scale: `[..., n, 1]`, of columns that lie in one group; None chooses those of whole groups, each when its
            first column is reached.
    """
    if runs_kernel(columns):
        from hf_blr.ops.triton import rounding

        size, tried = storage.group_size or columns.shape[-1], fractions_on(storage, columns.device)
        return Rounded(
            *rounding.round_columns(columns, upper, *storage.limits, storage.form.float8, size, tried, scale)
        )
    return plain_round_columns(columns, upper, storage, scale)


@cache
def fractions_on(storage: Bits, device: torch.device) -> Tensor:
    """`Bits.fractions`, made once."""
    return storage.fractions(device)


def plain_round_columns(columns: Tensor, upper: Tensor, storage: Bits, scale: Tensor | None = None) -> Rounded:
    """`round_columns` in plain PyTorch, in as few operations as can be."""
    left, width = columns.clone(), columns.shape[-1]
    errors = torch.empty_like(left)
    size = storage.group_size or width
    starts = range(0, width, size) if scale is None else range(0)
    scales = [] if scale is None else [scale]
    for begin, end in pairwise(sorted({*range(0, width, STRIDE), *starts, width})):
        if begin in starts:
            scales.append(storage.scales(left[..., begin : begin + size].float()))
        unit = scales[-1].to(left.dtype)
        own = off_codes(left[..., begin:end] / unit, upper[..., begin:end, begin:end], storage)
        torch.mul(own, unit, out=errors[..., begin:end])
        left[..., begin:] -= errors[..., begin:end] @ upper[..., begin:end, begin:]
    return Rounded(left, errors, torch.cat(scales, -1))


def off_codes(columns: Tensor, upper: Tensor, storage: Bits) -> Tensor:
    """What columns `[..., n, m]` in units of their scale are off their codes by, each when its turn comes."""
    left = columns.mT.contiguous()
    errors = torch.empty_like(left)
    behind = upper.unsqueeze(-1)
    for i, (column, error) in enumerate(zip(left.split(1, -2), errors.split(1, -2), strict=True)):
        torch.sub(column, storage.clamped(column), out=error)
        left[..., i + 1 :, :].addcmul_(behind[..., i, i + 1 :, :], error, value=-1)
    return errors.mT
