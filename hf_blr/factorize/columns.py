"""The columns of one scale rounded one after the other: the step of GPTQ that cannot be a product."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_blr.formats import Bits
from hf_blr.ops.dispatch import why_not_triton

#: columns between two updates of the columns behind them in a block, where a column is some operations; the kernel
#: takes all of a block
STRIDE = 32


def runs_kernel(columns: Tensor) -> bool:
    """Whether `round_columns` of such columns is one kernel. Float64 is not what a fit rounds in."""
    return columns.is_cuda and columns.dtype == torch.float32 and why_not_triton(columns, []) is None


def round_columns(columns: Tensor, upper: Tensor, storage: Bits) -> Tensor:
    """Rounds columns `[..., n, m]`, in units of their scale, one after the other; returns what each is off its code by.

    A column is rounded when it has been moved for the columns before it, by their rows of `upper` `[..., m, m]`.
    """
    if runs_kernel(columns):
        from hf_blr.ops.triton import rounding

        found: Tensor = rounding.round_columns(columns, upper, *storage.limits, storage.form.float8)
        return found
    return plain_round_columns(columns, upper, storage)


def plain_round_columns(columns: Tensor, upper: Tensor, storage: Bits) -> Tensor:
    """`round_columns` in plain PyTorch, in as few operations as can be."""
    left = columns.mT.contiguous()
    errors = torch.empty_like(left)
    behind = upper.unsqueeze(-1)
    for i, (column, error) in enumerate(zip(left.split(1, -2), errors.split(1, -2), strict=True)):
        torch.sub(column, storage.clamped(column), out=error)
        left[..., i + 1 :, :].addcmul_(behind[..., i, i + 1 :, :], error, value=-1)
    return errors.mT
