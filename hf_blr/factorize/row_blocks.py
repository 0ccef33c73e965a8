"""Rows of a factor in blocks, of which each moves those behind it when it is rounded.

A block takes every eighth row: what the metric couples most, dimensions of one head, stands close together, and rows
of one block have no feedback among each other.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hf_blr.factorize.gram import inverse_root

#: added to the diagonals of both metrics of a factor, as a fraction of their means: that of arXiv 2210.17323
DAMPING = 1e-2
#: more of them gain little: half as many give most of what twice as many do
ROW_BLOCKS = 8


def upper_root(matrix: Tensor) -> Tensor:
    """The upper triangular U with U^T U the inverse of a damped matrix `[..., n, n]`, in float64."""
    return inverse_root(matrix.double().flip(-1, -2), DAMPING).flip(-1, -2)


def moves_of(rows: Tensor, size: int) -> Tensor:
    """`[..., n, n]`: how rows move for an error in each, in blocks of this size; zero but for the blocks behind it."""
    wide = rows.double()
    mean = wide.diagonal(dim1=-2, dim2=-1).mean(-1, keepdim=True)
    # rows that fill up are coupled to nothing
    filled = torch.nn.functional.pad(wide, (0, size * ROW_BLOCKS - rows.shape[-1]) * 2)
    filled.diagonal(dim1=-2, dim2=-1)[..., rows.shape[-1] :] = mean
    upper = upper_root(in_blocks(filled, size))
    moves = torch.zeros_like(upper)
    for b in range(ROW_BLOCKS - 1):
        own, behind = slice(b * size, (b + 1) * size), slice((b + 1) * size, None)
        move = torch.linalg.solve_triangular(upper[..., own, own], upper[..., own, behind], upper=True)
        moves[..., behind, own] = -move.mT
    return moves


def in_blocks(matrix: Tensor, size: int) -> Tensor:
    """`[..., n, n]` with rows and columns in the order of the blocks that `split` makes, of `size` rows each."""
    for axis in (-1, -2):
        matrix = matrix.unflatten(axis, (size, ROW_BLOCKS)).transpose(axis - 1, axis).flatten(axis - 1, axis)
    return matrix


def felt_of_rows(metric: Tensor, rows: Tensor) -> Tensor:
    """What independent errors of one in the rows of a factor cost when the rows behind have made up for them: `[n]`.

    Args:
        metric: G `[n, n]`, in which errors count.
        rows: M `[n, n]`, in which rows move.
    """
    n = len(rows)
    size = -(-n // ROW_BLOCKS)
    # errors of all rows, for an error of one in each
    spread = torch.eye(size * ROW_BLOCKS, dtype=torch.float64, device=rows.device) - moves_of(rows, size)
    padded = torch.nn.functional.pad(metric.double(), (0, size * ROW_BLOCKS - n) * 2)
    felt = ((in_blocks(padded, size) @ spread) * spread).sum(0)
    return felt.view(ROW_BLOCKS, size).T.flatten()[:n]


def split(factor: Tensor, count: int) -> Tensor:
    """`[..., n, k]` -> `[count, ..., m, k]`: row i goes to block i % count; rows of zeros fill the last ones up."""
    padded = torch.nn.functional.pad(factor, (0, 0, 0, -factor.shape[-2] % count))
    return padded.unflatten(-2, (-1, count)).movedim(-2, 0).clone()


def joined(parts: Tensor, n: int) -> Tensor:
    """The inverse of `split`, for n rows."""
    return parts.movedim(0, -2).flatten(-3, -2)[..., :n, :]
