"""Pivoted low-rank in plain PyTorch: the oracle of the kernels, and what runs where no kernel does."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_blr.ops.blocks import as_rows

if TYPE_CHECKING:
    from hf_blr.ops.experts import Routed


def pivoted_linear(x: Tensor, u: Tensor, c: Tensor, order: Tensor, bias: Tensor | None = None) -> Tensor:
    """x `[..., K]`, u `[N, R]`, c `[R, K - R]`, order `[K]` -> `[..., N]`. PIFA, PMLR 267, pivots among the inputs."""
    r = c.shape[0]
    rows = as_rows(x).index_select(-1, order)
    y = torch.addmm(rows[:, :r], rows[:, r:], c.mT)
    return F.linear(y, u, bias).view(*x.shape[:-1], u.shape[0])


def pivoted_experts(rows: Routed, x: Tensor, u: Tensor, c: Tensor, order: Tensor) -> Tensor:
    """x `[S, K]`, u `[E, N, R]`, c `[E, R, K - R]`, order `[E, K]` -> `[S, N]`, each row by those of its expert."""
    r = c.shape[1]
    x = x.gather(1, rows.own(order).long())
    return rows.product(x[:, :r] + rows.product(x[:, r:], c), u)


def pivoted_dense(u: Tensor, c: Tensor, order: Tensor) -> Tensor:
    """The matrix `[N, K]` that `pivoted_linear` multiplies by."""
    return torch.cat([u, u @ c], dim=1).index_select(1, order.argsort())


def pivoted_pair(u: Tensor, c: Tensor, order: Tensor) -> tuple[Tensor, Tensor]:
    """u `[N, R]` and v `[R, K]`: the columns of the identity and c where the features stand; no number is rounded."""
    identity = torch.eye(c.shape[0], dtype=c.dtype, device=c.device)
    return u, torch.cat([identity, c], dim=1).index_select(1, order.argsort())


def fits(in_features: int, u: Tensor, c: Tensor, order: Tensor) -> bool:
    r = u.shape[-1]
    return order.shape == (in_features,) and c.shape == (r, in_features - r)
