"""Rounding that lets later numbers make up for the errors of earlier ones: GPTQ (arXiv 2210.17323), in both directions.

Errors D of a factor f `[n, k]` cost tr(M D H D^T), with H the Gram matrix `[k, k]` of what the factor multiplies and M
`[n, n]` the metric of what it puts out. Columns are rounded one after the other; what a column's rounding costs is
lowered by moving the columns that are still numbers. A row does that for itself whatever M is. Between rows it is the
same with M in the place of H (arXiv 2505.22988): what is left of a row's error is lowered by moving the rows that are
still numbers. That goes by blocks of rows, each spread over all of them, since rows that M couples most stand close to
each other.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hf_blr.factorize.columns import column_blocks, round_columns
from hf_blr.factorize.roots import Roots
from hf_blr.factorize.row_blocks import ROW_BLOCKS, joined, split
from hf_blr.formats import Bits, Codes


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
    rows_count, count = len(sweep.left), len(sweep.blocks)
    for step in range(count + rows_count - 1):
        # a block of rows is one block of columns behind the one before it, so that they can go on together
        alike: dict[tuple[int, bool], list[int]] = {}
        for b in range(max(0, step - count + 1), min(rows_count, step + 1)):
            first, end = sweep.blocks[step - b]
            alike.setdefault((end - first, sweep.begins(first)), []).append(b)
        for together in alike.values():
            sweep.round({b: sweep.blocks[step - b] for b in together})
    numbers = joined(sweep.left, factor.shape[-2])
    scale = joined(torch.stack([torch.cat(scales, -1) for scales in sweep.scales]), factor.shape[-2])
    return storage.rounded(numbers, scale)


class Sweep:
    """One factor on its way to codes, in blocks of rows and of columns.

    left: `[blocks, ..., m, k]`: numbers where codes are chosen, else what is to be rounded.
    target: the same before the feedback between columns.
    blocks: (first, end) of the blocks of columns.
    """

    def __init__(self, factor: Tensor, gram: Tensor, storage: Bits, rows: Tensor | None, roots: Roots):
        self.storage, self.k = storage, factor.shape[-1]
        self.size = storage.group_size or self.k
        self.blocks = column_blocks(self.k, self.size)
        self.upper = roots.upper(gram).to(factor.dtype)
        count = 1 if rows is None else ROW_BLOCKS
        parts = split(factor, count)
        self.left, self.target = self.both = torch.stack([parts, parts])
        self.scales: list[list[Tensor]] = [[] for _ in range(count)]
        moves = [] if rows is None else roots.moves(rows, parts.shape[-2])
        self.moves = [move.to(factor.dtype).view(*factor.shape[:-2], *move.shape[-2:]) for move in moves]

    def begins(self, first: int) -> bool:
        """Whether a group begins with this column."""
        return first % self.size == 0

    def round(self, at: dict[int, tuple[int, int]]) -> None:
        """Rounds, of each of these blocks of rows, this block of columns; they are alike."""
        first, end = next(iter(at.values()))
        part = torch.stack([self.left[b][..., slice(*columns)] for b, columns in at.items()])
        upper = torch.stack([self.upper[..., slice(*columns), slice(*columns)] for columns in at.values()])
        scale = None
        if not self.begins(first):
            scale = torch.stack([self.scales[b][-1] for b in at])
        elif self.size > end - first:
            groups = torch.stack([self.left[b][..., c : c + self.size] for b, (c, _) in at.items()])
            scale = self.storage.scales(groups.float())
        found = round_columns(part, upper, self.storage, scale)
        for place, (b, (c, behind)) in enumerate(at.items()):
            self.left[b][..., c:behind] = found.numbers[place]
            if self.begins(c):
                self.scales[b].append(found.scale[place])
            self.left[b][..., behind:] -= found.errors[place] @ self.upper[..., c:behind, behind:]
            self.move_rows(b, slice(c, behind))

    def move_rows(self, b: int, columns: slice) -> None:
        """Lets the blocks of rows behind b make up for what b has lost in these columns."""
        if b >= len(self.moves):
            return
        lost = self.target[b][..., columns] - self.left[b][..., columns]
        moved = (self.moves[b] @ lost).unflatten(-2, (-1, lost.shape[-2])).movedim(-3, 0)
        self.both[:, b + 1 :, ..., columns] += moved
