"""Rounding that lets later numbers make up for the errors of earlier ones: GPTQ (arXiv 2210.17323), in both directions.

Errors D of a factor f `[n, k]` cost tr(M D H D^T), with H the Gram matrix `[k, k]` of what the factor multiplies and M
`[n, n]` the metric of what it puts out. Columns are rounded one after the other; what a column's rounding costs is
lowered by moving the columns that are still numbers. A row does that for itself whatever M is. Between rows it is the
same with M in the place of H (arXiv 2505.22988): what is left of a row's error is lowered by moving the rows that are
still numbers. That goes by blocks of rows, each spread over all of them, since rows that M couples most stand close to
each other.
"""

from __future__ import annotations

from itertools import groupby

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
    strips, count = len(sweep.given), len(sweep.blocks)
    for step in range(count + strips - 1):
        # a block of rows is one block of columns behind the one before it, so that they can go on together
        at = {b: sweep.blocks[step - b] for b in range(max(0, step - count + 1), min(strips, step + 1))}
        for _, alike in groupby(at, key=lambda b: sweep.shape_at(*at[b])):
            sweep.round({b: at[b] for b in alike})
    numbers = joined(sweep.done[0], factor.shape[-2])
    scale = joined(torch.stack([torch.cat(scales, -1) for scales in sweep.scales]), factor.shape[-2])
    return storage.rounded(numbers, scale)


class Sweep:
    """One factor on its way to codes, in blocks of rows and of columns.

    given: what is to be rounded `[blocks, ..., m, k]`.
    done: of what is rounded, zero elsewhere, in one tensor `[3, blocks, ..., m, k]`: what codes stand for; what columns
        were off that when their turn came; what feedback between columns and rounding have taken.
    moves: as of `moves_of`, in strips `[blocks, ..., m, blocks * m]`, or None.
    blocks: (first, end) of the blocks of columns.
    """

    def __init__(self, factor: Tensor, gram: Tensor, storage: Bits, rows: Tensor | None, roots: Roots):
        self.storage, self.k = storage, factor.shape[-1]
        self.size = storage.group_size or self.k
        self.blocks = column_blocks(self.k, self.size)
        self.upper = roots.upper(gram).to(factor.dtype)
        self.given = split(factor, 1 if rows is None else ROW_BLOCKS)
        self.done = self.given.new_zeros(3, *self.given.shape)
        self.scales: list[list[Tensor]] = [[] for _ in self.given]
        self._views: dict[tuple[str, int, int], Tensor] = {}
        self.moves = None
        if rows is not None:
            m = self.given.shape[-2]
            moves = roots.moves(rows, m).to(factor.dtype).view(*factor.shape[:-2], ROW_BLOCKS * m, ROW_BLOCKS * m)
            self.moves = moves.unflatten(-2, (ROW_BLOCKS, m)).movedim(-3, 0)

    def of(self, name: str, first: int, end: int) -> Tensor:
        """These columns of `given`, `done` or `upper`, in the same memory: each block of rows asks for the same."""
        key = name, first, end
        if key not in self._views:
            self._views[key] = getattr(self, name)[..., first:end]
        return self._views[key]

    def shape_at(self, first: int, end: int) -> tuple[int, bool]:
        """The width of a block of columns, and whether a group begins with it."""
        return end - first, first % self.size == 0

    def round(self, at: dict[int, tuple[int, int]]) -> None:
        """Rounds, of each of these blocks of rows, this block of columns; neighbours with blocks of one shape."""
        width, begins = self.shape_at(*next(iter(at.values())))
        # a scale is chosen for all columns of its group
        wide = max(width, self.size) if begins else width
        target, now = self.standing(list(at), [slice(c, c + wide) for c, _ in at.values()])
        scale = None
        if not begins:
            scale = torch.stack([self.scales[b][-1] for b in at])
        elif wide > width:
            scale = self.storage.scales(now.float())
        upper = torch.stack([self.of("upper", c, e)[..., c:e, :] for c, e in at.values()])
        found = round_columns(now[..., :width], upper, self.storage, scale)
        done = torch.stack([found.numbers, found.errors, target[..., :width] - found.numbers])
        for place, (b, (c, e)) in enumerate(at.items()):
            self.of("done", c, e)[:, b] = done[:, place]
            if begins:
                self.scales[b].append(found.scale[place])

    def standing(self, at: list[int], columns: list[slice]) -> tuple[Tensor, Tensor]:
        """What blocks of rows are to be in these columns, and what stands there when the columns before are rounded.

        Both `[len(at), ..., m, columns]`.
        """
        target = torch.stack([self.of("given", c.start, c.stop)[b] for b, c in zip(at, columns, strict=True)])
        blocks = slice(at[0], at[-1] + 1)
        above, before = at[-1], max(c.start for c in columns)
        if self.moves is not None and above:
            # [len(at), ..., above * m, columns]
            lost = torch.stack([self.of("done", c.start, c.stop)[2, :above] for c in columns])
            lost = lost.movedim(1, -3).flatten(-3, -2)
            target += self.moves[blocks, ..., : lost.shape[-2]] @ lost
        if not before:
            return target, target
        upper = torch.stack([self.of("upper", c.start, c.stop)[..., :before, :] for c in columns])
        return target, target - self.done[1, blocks, ..., :before] @ upper
