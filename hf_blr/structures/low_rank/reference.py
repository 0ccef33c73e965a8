"""Low-rank in plain PyTorch: the oracle of the kernels, and what runs where no kernel does."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from hf_blr.ops.experts import Routed


def low_rank_linear(x: Tensor, u: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """x `[..., K]`, u `[N, R]`, v `[R, K]` -> `[..., N]`."""
    return F.linear(F.linear(x, v), u, bias)


def low_rank_experts(rows: Routed, x: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """x `[S, K]`, u `[E, N, R]`, v `[E, R, K]` -> `[S, N]`, each row by the factors of its expert."""
    return rows.product(rows.product(x, v), u)


def low_rank_dense(u: Tensor, v: Tensor) -> Tensor:
    """The matrix `[N, K]` that `low_rank_linear` multiplies by."""
    return u @ v


def low_rank_pair(u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """The factors u `[N, R]` and v `[R, K]` as they are."""
    return u, v


def fits(in_features: int, u: Tensor, v: Tensor) -> bool:
    return in_features == v.shape[-1] and u.shape[-1] == v.shape[0]
