"""The matrices of many pairs of factors, made in one step of the autograd graph.

A cast, a product and their backward for each layer are a thousand small kernels and nodes in every step, which the
host starts one by one. Here the casts of many layers are one kernel.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def products(pairs: Sequence[tuple[Tensor, Tensor]], dtype: torch.dtype) -> tuple[Tensor, ...]:
    """u v `[N, K]` of each pair, differentiable.

    The gradients of all pairs are made when those of all matrices are there.

    Args:
        pairs: u `[N, R]` and v `[R, K]` each, on one device.
        dtype: that u and v are cast to, of the products and of the matrices.
    """
    found: tuple[Tensor, ...] = Products.apply(dtype, *(factor for pair in pairs for factor in pair))
    return found


class Products(torch.autograd.Function):
    """Of u, v, u, v, ..."""

    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, *factors: Tensor) -> Any:
        ctx.dtypes = [factor.dtype for factor in factors]
        cast = cast_all(factors, [dtype] * len(factors))
        ctx.save_for_backward(*cast)
        return tuple(u @ v for u, v in zip(cast[::2], cast[1::2], strict=True))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        cast = ctx.saved_tensors
        found: list[Tensor] = []
        for u, v, grad in zip(cast[::2], cast[1::2], grads, strict=True):
            found += [grad @ v.mT, u.mT @ grad]
        return None, *cast_all(found, ctx.dtypes)


def cast_all(tensors: Sequence[Tensor], dtypes: Sequence[torch.dtype]) -> list[Tensor]:
    """Copies of these dtypes, by one kernel on a GPU."""
    cast = [torch.empty_like(tensor, dtype=dtype) for tensor, dtype in zip(tensors, dtypes, strict=True)]
    torch._foreach_copy_(cast, list(tensors))
    return cast
