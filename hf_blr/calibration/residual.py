"""Sums over the rows of activations that count, and which layers write to the residual stream."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from hf_blr.calibration.padding import real_rows

#: rows that are made float32 at a time: a batch's, in an MLP, would take gigabytes
ROWS = 4096

#: a block's output may differ by this fraction from what its residual writers add up to, and count as explained: bf16
#: streams round by as much
RESIDUAL_TOLERANCE = 0.1


def residual_writers(added: Tensor, outputs: dict[str, Tensor], real: Tensor | None = None) -> list[str]:
    """The layers whose outputs add up to what a block adds to the residual stream; none if no such set does.

    args: added `[..., hidden]`; {layer: its output}, of which those of another shape cannot be writers; the positions
    that count.
    """
    candidates = {name: out for name, out in outputs.items() if out.shape == added.shape}
    if not candidates:
        return []
    # inner products of what was added and of each candidate
    products = added.new_zeros(len(candidates) + 1, len(candidates) + 1, dtype=torch.float64)
    for parts in wide_parts(*(real_rows(x, real) for x in (added, *candidates.values()))):
        columns = torch.stack([part.flatten() for part in parts])
        products += columns @ columns.mT
    # regressed on all of them, the writers come out as one and the others as zero
    weights = torch.linalg.lstsq(products[1:, 1:], products[1:, :1]).solution.flatten()
    writes = weights > 0.5
    signs = torch.cat([products.new_ones(1), -writes.double()])
    unexplained = signs @ products @ signs
    explained = unexplained <= RESIDUAL_TOLERANCE**2 * products[0, 0]
    return [name for name, each in zip(candidates, writes.tolist(), strict=True) if each and explained]


def wide_parts(*rows: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The same rows of each `[T, K]`, in float32, `ROWS` at a time."""
    for parts in zip(*(each.split(ROWS) for each in rows), strict=True):
        yield tuple(part.float() for part in parts)


def add_product(total: Tensor | None, left: Tensor, right: Tensor) -> Tensor:
    """total + left^T right, in the memory of `total`."""
    return left.mT @ right if total is None else total.addmm_(left.mT, right)


def counted(hidden: Tensor, real: Tensor | None) -> Tensor:
    """The hidden states `[rows, hidden]` of positions that count; all of them, in their shape, where all do."""
    return hidden if real is None else real_rows(hidden, real)
