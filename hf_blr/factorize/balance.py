"""The free scales inside a factorisation, chosen so that fine-tuning moves all factors alike."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_blr.structures import BLRSpec, Monarch


def balanced(spec: BLRSpec, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same matrix, with equal norms in u and v for each index of the rank, and BLAST's s of unit mean square.

    tensors: {"u", ("s",) "v"} in the shapes of the spec.
    """
    u, s, v = tensors["u"], tensors.get("s"), tensors["v"]
    (b1, b2), (p, _), r = spec.num_blocks, spec.block_shape, spec.rank
    tiny = torch.finfo(u.dtype).tiny
    if s is not None:
        scale = s.square().mean(1, keepdim=True).sqrt().clamp_min(tiny)  # [B2, 1, R]
        u, s = u * scale, s / scale
    if isinstance(spec, Monarch):
        # each block pair has ranks of its own
        columns, rows = u.view(b2, -1, b1, r), v.view(b1, b2, r, p).transpose(0, 1)  # [B2, Q, B1, R], [B2, B1, R, P]
    else:
        columns, rows = u.reshape(1, -1, 1, r), v.view(b1, r, p).transpose(0, 1).reshape(1, 1, r, -1)
    share = (columns.norm(dim=1) / rows.norm(dim=-1).clamp_min(tiny)).clamp_min(tiny).sqrt()
    columns, rows = columns / share.unsqueeze(1), rows * share.unsqueeze(-1)
    inner = rows.transpose(0, 1) if isinstance(spec, Monarch) else rows.view(r, b1, p).transpose(0, 1)
    scaled = {"u": columns.reshape(u.shape), "s": s, "v": inner.reshape(v.shape)}
    return {name: scaled[name].contiguous() for name in spec.factor_names}
