"""Monarch in plain PyTorch: the oracle of the kernels, and what runs where no kernel does."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hf_blr.ops.blocks import expand, project

if TYPE_CHECKING:
    from hf_blr.ops.experts import Routed


def monarch_linear(x: Tensor, u: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """x `[..., K]`, u `[B2, Q, B1*R]`, v `[B1, B2*R, P]` -> `[..., N]`. arXiv 2204.00595."""
    y = project(x, v)
    (b1, _, tokens), (b2, _, width) = y.shape, u.shape
    # [B1, B2, R, T] -> [B2, B1*R, T]: the two block indices swap places
    z = y.view(b1, b2, width // b1, tokens).transpose(0, 1).reshape(b2, width, tokens)
    return expand(z, u, bias, x.shape[:-1])


def monarch_experts(rows: Routed, x: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """x `[S, K]`, u `[E, B2, Q, B1*R]`, v `[E, B1, B2*R, P]` -> `[S, N]`, each row by the factors of its expert."""
    (_, b1, _, p), (_, b2, _, width) = v.shape, u.shape
    y = rows.blocks(x.unflatten(1, (b1, p)), v)
    z = y.unflatten(2, (b2, width // b1)).transpose(1, 2).flatten(2)
    return rows.blocks(z, u).flatten(1)


def monarch_dense(u: Tensor, v: Tensor) -> Tensor:
    """The matrix `[N, K]` that `monarch_linear` multiplies by."""
    (b2, q, _), (b1, _, p) = u.shape, v.shape
    blocks = torch.einsum("iqjr,jirp->iqjp", u.view(b2, q, b1, -1), v.view(b1, b2, -1, p))
    return blocks.reshape(b2 * q, b1 * p)


def fits(in_features: int, u: Tensor, v: Tensor) -> bool:
    return in_features == v.shape[0] * v.shape[2] and v.shape[1] * v.shape[0] == u.shape[2] * u.shape[0]
