"""Dense layers trained in float8, which factors in float8 are measured against: a scale a tensor, PyTorch's product.

The recipe is that of most libraries: x, W and g are cast once each with the largest number of the whole tensor, and the
codes are transposed for the products that sum over the other axis.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hf_blr.ops.cast import FLOAT8, LARGEST


class Product(torch.autograd.Function):
    """x `[T, K]`, W `[N, K]` -> `[T, N]`, in bfloat16."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        (x8, x_scale), (w8, w_scale) = cast(x), cast(weight)
        ctx.save_for_backward(x8, x_scale, w8, w_scale)
        return product(x8, w8, x_scale, w_scale)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x8, x_scale, w8, w_scale = ctx.saved_tensors
        g8, g_scale = cast(grad)
        dx = product(g8, w8.T.contiguous(), g_scale, w_scale)
        return dx, product(g8.T.contiguous(), x8.T.contiguous(), g_scale, x_scale)


def cast(t: Tensor) -> tuple[Tensor, Tensor]:
    """(codes, scale): by rows first, as the kernel that makes t can find the largest number of a row."""
    scale = t.abs().amax(-1).amax().float().clamp_min(1e-12) / LARGEST
    return (t.float() / scale).to(FLOAT8), scale


def product(a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor) -> Tensor:
    """a b^T."""
    return torch._scaled_mm(a, b.T, a_scale, b_scale, out_dtype=torch.bfloat16, use_fast_accum=True)


class Float8Linear(nn.Module):
    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.weight = linear.weight

    def forward(self, x: Tensor) -> Tensor:
        out = Product.apply(x.reshape(-1, x.shape[-1]), self.weight)
        return out.view(*x.shape[:-1], out.shape[-1])
