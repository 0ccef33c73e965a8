"""Rows times the matrices of their experts: one product for each expert, as an op that looks at the counts itself.

PyTorch has such a product for CUDA in bfloat16, which leaves the counts on the device; `product` takes that where it
can. Everywhere else a loop over the experts runs, the oracle of the others. Being an op, it is one node to
`torch.compile`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hf_blr.ops.library import define_op

#: bytes at which rows of PyTorch's product must begin
ALIGNED = 16


def product(x: Tensor, w: Tensor, offsets: Tensor, plain: bool) -> Tensor:
    """Row s of x `[S, K]` times the matrix of its expert, of w `[E, N, K]`; differentiable in both.

    Args:
        x: rows, those of one expert behind those of the one before, in w's dtype.
        w: of any strides.
        offsets: `[E]` int32, where the rows of each expert end. Rows behind the last are undefined.
        plain: whether the loop runs.

    Returns:
        `[S, N]`.
    """
    if torch.compiler.is_compiling():
        # a copy begins at an aligned byte, a slice at one that compilers do not show
        x = x.contiguous()
    if plain or not takes_grouped_mm(x, w):
        out: Tensor = GroupedProduct.apply(x, w, offsets)
        return out
    grouped = getattr(torch.nn.functional, "grouped_mm", None) or torch._grouped_mm
    return grouped(x, w.mT, offs=offsets)


def takes_grouped_mm(x: Tensor, w: Tensor) -> bool:
    """Whether PyTorch's product takes these without waiting for the counts: bfloat16, aligned rows, from Hopper on."""
    if not x.is_cuda or x.dtype != torch.bfloat16 or torch.cuda.get_device_capability(x.device) < (9, 0):
        return False
    if not (hasattr(torch.nn.functional, "grouped_mm") or hasattr(torch, "_grouped_mm")):
        return False
    return x.stride(-1) == 1 and 1 in w.stride()[1:] and is_aligned(x) and is_aligned(w)


def is_aligned(t: Tensor) -> bool:
    """Whether every row begins at a multiple of `ALIGNED` bytes, of memory that does.

    While a graph is compiled, t is taken to begin where its memory does.
    """
    steps = [stride for stride in t.stride() if stride != 1]
    if not torch.compiler.is_compiling():
        steps.append(t.storage_offset())
    # a matrix with one row or column shows no stride of its rows
    steps.append(max(t.shape[-2:]) if 1 in t.shape[-2:] else 0)
    return all(step * t.element_size() % ALIGNED == 0 for step in steps)


class GroupedProduct(torch.autograd.Function):
    """`hf_blr::expert_products` with its gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, offsets: Tensor) -> Tensor:
        ctx.save_for_backward(x, w, offsets)
        out: Tensor = torch.ops.hf_blr.expert_products(x, w, offsets)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, w, offsets = ctx.saved_tensors
        need_x, need_w, _ = ctx.needs_input_grad
        dx = torch.ops.hf_blr.expert_products(grad, w.mT, offsets) if need_x else None
        return dx, torch.ops.hf_blr.expert_outer_products(grad, x, offsets) if need_w else None, None


def _products(x: Tensor, w: Tensor, offsets: Tensor) -> Tensor:
    out = x.new_zeros(len(x), w.shape[1])
    for expert, (start, stop) in enumerate(spans(offsets)):
        if start < stop:
            out[start:stop] = x[start:stop] @ w[expert].mT
    return out


def _outer_products(grad: Tensor, x: Tensor, offsets: Tensor) -> Tensor:
    out = x.new_zeros(len(offsets), grad.shape[1], x.shape[1])
    for expert, (start, stop) in enumerate(spans(offsets)):
        if start < stop:
            out[expert] = grad[start:stop].mT @ x[start:stop]
    return out


def spans(offsets: Tensor) -> list[tuple[int, int]]:
    """Where the rows of each expert begin and end."""
    stops = offsets.tolist()
    return list(zip([0, *stops], stops, strict=False))


define_op(
    "expert_products(Tensor x, Tensor w, Tensor offsets) -> Tensor",
    _products,
    lambda x, w, offsets: x.new_empty(x.shape[0], w.shape[1]),
)
define_op(
    "expert_outer_products(Tensor grad, Tensor x, Tensor offsets) -> Tensor",
    _outer_products,
    lambda grad, x, offsets: x.new_empty(offsets.shape[0], grad.shape[1], x.shape[1]),
)
