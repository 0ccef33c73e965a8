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
    candidates = {name: rows_of(out, real) for name, out in outputs.items() if out.shape == added.shape}
    added = rows_of(added, real)
    if not candidates:
        return []
    # regressed on all of them, the writers come out as one and the others as zero
    columns = torch.stack([out.flatten() for out in candidates.values()], 1)
    weights = torch.linalg.lstsq(columns.mT @ columns, columns.mT @ added.flatten()).solution
    writers = [name for name, weight in zip(candidates, weights.tolist(), strict=True) if weight > 0.5]
    unexplained = added - sum(candidates[name] for name in writers)
    return writers if unexplained.norm() <= RESIDUAL_TOLERANCE * added.norm() else []


def rows_of(x: Tensor, real: Tensor | None) -> Tensor:
    return real_rows(x, real).float()


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
