"""Stages that structures share in plain PyTorch: blocks of inputs projected, blocks of outputs expanded.

Any leading shape, any float dtype, any device; differentiable by autograd.
"""

from __future__ import annotations

import torch
from torch import Tensor


def as_rows(x: Tensor) -> Tensor:
    """x `[..., K]` -> `[T, K]`."""
    return x.reshape(-1, x.shape[-1])


def project(x: Tensor, v: Tensor) -> Tensor:
    """x `[..., K]`, v `[B1, R, P]` -> y `[B1, R, T]`.

    Tokens last: every product that follows then has a contiguous axis, and none is copied before it is multiplied. On
    a CPU that makes a training step of BLAST twice as fast as with the rank last.
    """
    b1, _, p = v.shape
    # -1 counts no tokens, too, as well as a symbolic number of them, of which a `torch.Size` has no product
    return torch.bmm(v, x.reshape(-1, b1, p).permute(1, 2, 0))


def expand(z: Tensor, u: Tensor, bias: Tensor | None, lead: torch.Size) -> Tensor:
    """z `[B2, R, T]`, u `[B2, Q, R]` -> `[*lead, N]`."""
    b2, q, _ = u.shape
    out = torch.bmm(u, z).permute(2, 0, 1).reshape(*lead, b2 * q)
    return out if bias is None else out + bias
