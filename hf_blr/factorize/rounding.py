"""Rounding that lets later numbers make up for the errors of earlier ones: GPTQ (arXiv 2210.17323), in both directions.

Errors D of a factor f `[n, k]` cost tr(M D H D^T), with H the Gram matrix `[k, k]` of what the factor multiplies and M
`[n, n]` the metric of what it puts out. Columns are rounded one after the other; what a column's rounding costs is
lowered by moving the columns that are still numbers. A row does that for itself whatever M is. Between rows it is the
same with M in the place of H (arXiv 2505.22988): what is left of a row's error is lowered by moving the rows that are
still numbers. That goes by blocks of rows, each spread over all of them, since rows that M couples most stand close to
each other.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from hf_blr.factorize.columns import STRIDE, round_columns, runs_kernel
from hf_blr.factorize.roots import Roots
from hf_blr.factorize.row_blocks import ROW_BLOCKS, joined, split
from hf_blr.formats import Bits, Codes

#: columns between two updates of all columns behind them
BLOCK = 128


def rounded_in_metric(
    factor: Tensor, gram: Tensor | None, storage: Bits, rows: Tensor | None = None, roots: Roots | None = None
) -> Codes:
    """The codes of a factor `[..., n, k]`, chosen column by column in the metrics of both of its sides.

    Scales are chosen when the first column of their group is reached, for the numbers that then stand there. Without a
    Gram all codes are the nearest.

    Args:
        factor: f.
        gram: H `[..., k, k]`.
        storage: the format.
        rows: M `[..., n, n]`, also `[1, n, n]` of a single factor; None is the identity, in which rows have nothing to
            do with each other.
        roots: what remembers the roots of these metrics.
    """
    if gram is None:
        return storage.nearest(factor.float())
    sweep = Sweep(factor, gram, storage, rows, roots or Roots())
    blocks, columns = len(sweep.left), -(-factor.shape[-1] // BLOCK)
    for step in range(columns + blocks - 1):
        # a block of rows is one block of columns behind the one before it, so that they can go on together
        at = {b: (step - b) * BLOCK for b in range(blocks) if 0 <= step - b < columns}
        alike: dict[tuple[int, ...], list[int]] = {}
        for b, first in at.items():
            alike.setdefault(sweep.shape_at(first), []).append(b)
        for together in alike.values():
            sweep.round({b: at[b] for b in together})
    numbers = joined(sweep.left, factor.shape[-2])
    scale = joined(torch.stack([torch.cat(scales, -1) for scales in sweep.scales]), factor.shape[-2])
    return storage.rounded(numbers, scale)


class Sweep:
    """One factor on its way to codes, in blocks of rows.

    left: `[blocks, ..., m, k]`: numbers where codes are chosen, else what is to be rounded.
    target: the same before the feedback between columns.
    """

    def __init__(self, factor: Tensor, gram: Tensor, storage: Bits, rows: Tensor | None, roots: Roots):
        self.storage, self.k = storage, factor.shape[-1]
        self.size = storage.group_size or self.k
        self.upper = roots.upper(gram).to(factor.dtype)
        count = 1 if rows is None else ROW_BLOCKS
        self.left = split(factor, count)
        self.target = self.left.clone()
        self.scales: list[list[Tensor]] = [[] for _ in range(count)]
        moves = [] if rows is None else roots.moves(rows, self.left.shape[-2])
        self.moves = [move.to(factor.dtype).view(*factor.shape[:-2], *move.shape[-2:]) for move in moves]

    def starts(self, first: int) -> list[int]:
        """The columns of this block with which groups begin, counted from its first."""
        return [i for i in range(min(BLOCK, self.k - first)) if (first + i) % self.size == 0]

    def shape_at(self, first: int) -> tuple[int, ...]:
        """Blocks of columns with the same can be rounded together."""
        return (min(BLOCK, self.k - first), *self.starts(first))

    def round(self, at: dict[int, int]) -> None:
        """Rounds, of each of these blocks of rows, the block of columns that begins there."""
        first = next(iter(at.values()))
        width, starts = min(BLOCK, self.k - first), self.starts(first)
        # columns of a group that begins here may lie beyond the block
        wide = max([width, *(i + self.size for i in starts)])
        part = torch.stack([self.left[b][..., c : c + wide] for b, c in at.items()])
        upper = torch.stack([self.upper[..., c : c + width, c : c + wide] for c in at.values()])
        scales: list[Tensor] = []
        scale = None if starts[:1] == [0] else torch.stack([self.scales[b][-1] for b in at])
        errors = part.new_empty(*part.shape[:-1], width)
        stride = BLOCK if runs_kernel(part) else STRIDE
        for begin, end in pairwise(sorted({*range(0, width, stride), *starts, width})):
            if begin in starts:
                group = part[..., begin : begin + self.size].clone()
                # it has not seen the errors inside this block yet where it goes on beyond
                group[..., width - begin :] -= errors[..., :begin] @ upper[..., :begin, width : begin + self.size]
                scale = self.storage.scales(group.float())
                scales.append(scale)
            assert scale is not None
            unit = scale.to(part.dtype)
            own = round_columns(part[..., begin:end] / unit, upper[..., begin:end, begin:end], self.storage)
            torch.mul(own, unit, out=errors[..., begin:end])
            part[..., begin:width] -= errors[..., begin:end] @ upper[..., begin:end, begin:width]
        for place, (b, c) in enumerate(at.items()):
            self.left[b][..., c : c + width] = part[place, ..., :width]
            self.scales[b] += [found[place] for found in scales]
            self.left[b][..., c + width :] -= errors[place] @ self.upper[..., c : c + width, c + width :]
            self.move_rows(b, slice(c, c + width))

    def move_rows(self, b: int, columns: slice) -> None:
        """Lets the blocks of rows behind b make up for what b has lost in these columns."""
        if b >= len(self.moves):
            return
        lost = self.target[b][..., columns] - self.left[b][..., columns]
        moved = (self.moves[b] @ lost).unflatten(-2, (-1, lost.shape[-2])).movedim(-3, 0)
        self.target[b + 1 :, ..., columns] += moved
        self.left[b + 1 :, ..., columns] += moved
