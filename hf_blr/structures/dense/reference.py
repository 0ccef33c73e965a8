"""A dense layer in plain PyTorch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from hf_blr.ops.experts import Routed


def dense_linear(x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
    """x `[..., K]`, w `[N, K]` -> `[..., N]`."""
    return F.linear(x, w, bias)


def dense_experts(rows: Routed, x: Tensor, w: Tensor) -> Tensor:
    """x `[S, K]`, w `[E, N, K]` -> `[S, N]`, each row by the matrix of its expert."""
    return rows.product(x, w)


def dense_dense(w: Tensor) -> Tensor:
    """The matrix `[N, K]` that `dense_linear` multiplies by."""
    return w


def fits(in_features: int, w: Tensor) -> bool:
    return in_features == w.shape[-1]
