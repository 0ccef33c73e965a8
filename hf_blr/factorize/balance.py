"""The free scales inside a factorisation, chosen so that fine-tuning moves all factors alike."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_blr.structures import BLRSpec


def balanced(spec: BLRSpec, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same matrix, with equal norms in u and v for each index of the rank, which all blocks share.

    tensors: u `[N, R]` or `[B2, Q, R]`, v `[R, K]` or `[B1, R, P]`; others are passed on as they are.
    """
    u, v = tensors["u"], tensors["v"]
    b1, p, r = spec.num_blocks[0], spec.block_shape[0], spec.rank
    columns, rows = equal_norms(u.reshape(1, -1, 1, r), v.view(b1, r, p).transpose(0, 1).reshape(1, 1, r, -1))
    scaled = {"u": columns.reshape(u.shape), "v": rows.view(r, b1, p).transpose(0, 1).reshape(v.shape)}
    return {name: (scaled.get(name, tensor)).contiguous() for name, tensor in tensors.items()}


def equal_norms(columns: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Columns `[I, Q, J, R]` and rows `[I, J, R, P]` whose products stay the same and whose norms become equal."""
    tiny = torch.finfo(columns.dtype).tiny
    share = (columns.norm(dim=1) / rows.norm(dim=-1).clamp_min(tiny)).clamp_min(tiny).sqrt()
    return columns / share.unsqueeze(1), rows * share.unsqueeze(-1)
