"""BLAST in plain PyTorch: the oracle of the kernels, and what runs where no kernel does."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hf_blr.ops.blocks import expand, project

if TYPE_CHECKING:
    from hf_blr.ops.experts import Routed


def blast_linear(x: Tensor, u: Tensor, s: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """x `[..., K]`, u `[B2, Q, R]`, s `[B2, B1, R]`, v `[B1, R, P]` -> `[..., N]`. arXiv 2410.21262."""
    # one [B2, B1] x [B1, T] product for each r
    z = torch.bmm(s.permute(2, 0, 1), project(x, v).transpose(0, 1))
    return expand(z.transpose(0, 1), u, bias, x.shape[:-1])


def blast_experts(rows: Routed, x: Tensor, u: Tensor, s: Tensor, v: Tensor) -> Tensor:
    """x `[S, K]`, u `[E, B2, Q, R]`, s `[E, B2, B1, R]`, v `[E, B1, R, P]` -> `[S, N]`, each row by its expert's."""
    _, b1, _, p = v.shape
    y = rows.blocks(x.unflatten(1, (b1, p)), v)
    # one input block at a time: s of each row, all at once, is B1 times as large as z
    z = torch.zeros((), dtype=y.dtype, device=y.device)
    for j in range(b1):
        z = z + rows.own(s[:, :, j]).to(y.dtype) * y[:, j, None]
    return rows.blocks(z, u).flatten(1)


def blast_dense(u: Tensor, s: Tensor, v: Tensor) -> Tensor:
    """The matrix `[N, K]` that `blast_linear` multiplies by."""
    (b2, q, _), (b1, r, p) = u.shape, v.shape
    # s goes into v first: [B2, R, B1*P]
    rows = torch.einsum("ijr,jrp->irjp", s, v).reshape(b2, r, b1 * p)
    return torch.bmm(u, rows).view(b2 * q, b1 * p)


def fits(in_features: int, u: Tensor, s: Tensor, v: Tensor) -> bool:
    (b1, r, p), b2 = v.shape, u.shape[0]
    return in_features == b1 * p and u.shape[2] == r and s.shape == (b2, b1, r)
