"""Rounding that lets later columns make up for the errors of earlier ones: GPTQ (arXiv 2210.17323).

Errors D of a factor f `[n, k]` cost tr(D H D^T), with H the Gram matrix `[k, k]` of what the factor multiplies. Columns
are rounded one after the other; what a column's rounding costs is lowered by moving the columns that are still numbers.
Each row does that for itself, so that weights of rows change nothing. What couples rows, the off-diagonals of a metric
of the outputs, is left out.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hf_blr.factorize.gram import inverse_root
from hf_blr.formats import Bits, Codes

#: added to the diagonal of H, as a fraction of its mean: the paper's
DAMPING = 1e-2
#: columns between two updates of all columns behind them
BLOCK = 128


def rounded_in_metric(factor: Tensor, gram: Tensor | None, storage: Bits) -> Codes:
    """The codes of a factor `[..., n, k]`, chosen column by column in the metric of `gram` `[..., k, k]`.

    Scales are chosen when the first column of their group is reached, for the numbers that then stand there. Without a
    Gram all codes are the nearest.
    """
    if gram is None:
        return storage.nearest(factor.float())
    k = factor.shape[-1]
    size = storage.group_size or k
    # the upper U with H^-1 = U^T U: row i of U / U_ii says how columns behind i make up for an error in i
    upper = inverse_root(gram.double().flip(-1, -2), DAMPING).flip(-1, -2).to(factor.dtype)
    left = factor.clone()
    scales: list[Tensor] = []
    for first in range(0, k, BLOCK):
        last = min(first + BLOCK, k)
        errors: list[Tensor] = []
        for i in range(first, last):
            if i % size == 0:
                # columns of a group beyond this block have not seen the errors inside it yet
                group = left[..., i : i + size].clone()
                if errors and i + size > last:
                    group[..., last - i :] -= fed(errors, upper, first, slice(last, i + size))
                scales.append(storage.scales(group.float()))
            column = left[..., i : i + 1]
            numbers = storage.rounded(column, scales[-1]).numbers(factor.dtype)
            errors.append((column - numbers) / upper[..., i, i, None, None])
            left[..., i:last] -= errors[-1] * upper[..., i, None, i:last]
            left[..., i : i + 1] = numbers
        if last < k:
            left[..., last:] -= fed(errors, upper, first, slice(last, k))
    return storage.rounded(left, torch.cat(scales, -1))


def fed(errors: list[Tensor], upper: Tensor, first: int, columns: slice) -> Tensor:
    """What errors `[..., n, 1]` of the columns from `first` on take off these columns."""
    return torch.cat(errors, -1) @ upper[..., first : first + len(errors), columns]
