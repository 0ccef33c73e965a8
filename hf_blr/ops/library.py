"""The registered ops: one for each structure and direction, with schema and fake, run by the kernels of its record.

`torch.compile` sees each module call as one op, without a graph break; the kernels' module is imported when one first
runs. The autograd Functions stand outside the ops, which costs less per call than autograd registered inside.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hf_blr.ops.activations import activated
from hf_blr.ops.dispatch import compute_dtype, few_tokens
from hf_blr.structures.record import Structure
from hf_blr.structures.spec import FACTOR, INDEX

# The gradients. With g = d out, g[i] its output blocks, and y kept from the forward or computed again:
#   dz[i] = g[i] u[i]          du[i] = g[i]^T z[i]
#   dy    = mix^T(dz)          ds[i,j] = sum over t of dz[i] * y[j]    (BLAST; else dy is dz, blocks swapped)
#   dx[j] = dy[j] v[j]         dv[j] = dy[j]^T x[j]
# Pivoted: dx[order] = [dy, dy c] and dc = dy^T x[order[R:]].
# Every op takes its first factor as that of the last stage (u) and its last factor as that of the first (v, c).


def define_structure(record: Structure) -> Callable[..., Tensor]:
    """Register the forward and backward ops of a structure's kernels.

    The ops are `hf_blr::<name>(x, *tensors, bias, keep, activation) -> (out, y)` and `hf_blr::<name>_backward(grad, x,
    *tensors, y, needs) -> gradients of x and the factors`. `keep`: also return the first stage's result y for the
    backward; without it y comes back empty. `needs` says which gradients are wanted; an unwanted one comes back empty.

    Returns:
        (x `[..., K]`, tensors, bias, activation) -> `[..., N]`, differentiable in x, the factors and the bias.
    """
    name, factors, indices = record.name, record.spec.names(FACTOR), record.spec.names(INDEX)
    tensors = "".join(f", Tensor {t}" for t in factors + indices)
    gradients = ", ".join(["Tensor"] * (1 + len(factors)))
    count = len(factors)

    def forward(*args: Any) -> Any:
        return record.load("kernels").forward(*args)

    def backward(*args: Any) -> Any:
        return record.load("kernels").backward(*args)

    def forward_fake(x: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
        u, v, keep = others[0], others[count - 1], others[-2]
        out = x.new_empty(x.shape[0], u.shape[:-1].numel())
        return out, x.new_empty(*v.shape[:-2], x.shape[0], v.shape[-2]) if keep else x.new_empty(0)

    def backward_fake(grad: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
        pairs = zip(inputs[: 1 + count], inputs[-1], strict=True)
        return tuple(torch.empty_like(t) if need else t.new_empty(0) for t, need in pairs)

    define_op(
        f"{name}(Tensor x{tensors}, Tensor? bias, bool keep, str activation) -> (Tensor, Tensor)", forward, forward_fake
    )
    define_op(
        f"{name}_backward(Tensor grad, Tensor x{tensors}, Tensor y, bool[] needs) -> ({gradients})",
        backward,
        backward_fake,
    )
    op, backward_op = getattr(torch.ops.hf_blr, name), getattr(torch.ops.hf_blr, f"{name}_backward")

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, bias: Tensor | None, x: Tensor, *tensors: Tensor) -> Tensor:
            # y is worth its memory while it is no larger than x, which is kept anyway: computing it again is a sixth
            # of the layer's work; the kernels for few tokens never write it
            v = tensors[count - 1]
            y_width = v.numel() // x.shape[1] * (1 if v.dim() == 2 else v.shape[0])
            keep = y_width <= x.shape[1] and not few_tokens(x)
            out, y = op(x, *tensors, bias, keep, "")
            ctx.save_for_backward(x, *tensors, y)
            return out

        @staticmethod
        @once_differentiable
        def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
            need_bias, *needs = ctx.needs_input_grad
            wanted = list(needs[: 1 + count])
            grad = contiguous_rows(grad, grad.dtype)
            found = backward_op(grad, *ctx.saved_tensors, wanted) if any(wanted) else (None,) * len(wanted)
            gradients = [g if need else None for g, need in zip(found, wanted, strict=True)]
            # indices have none
            return grad.sum(0) if need_bias else None, *gradients, *(None for _ in indices)

    Function.__name__ = Function.__qualname__ = f"{record.spec.__name__}Function"

    def call(x: Tensor, tensors: Sequence[Tensor], bias: Tensor | None, activation: str = "") -> Tensor:
        lead, dtype = x.shape[:-1], compute_dtype(x)
        x = contiguous_rows(x.reshape(-1, x.shape[-1]), dtype)
        # indices keep their dtype
        tensors = [contiguous_rows(t, dtype if i < count else t.dtype) for i, t in enumerate(tensors)]
        bias = None if bias is None else contiguous_rows(bias, dtype)
        inputs = (x, *tensors) if bias is None else (x, *tensors, bias)
        # without a gradient to compute, decode is spared the Function: some 200 calls per token in a model
        if torch.is_grad_enabled() and any(t.requires_grad for t in inputs):
            out = activated(Function.apply(bias, x, *tensors), activation)
        else:
            out, _ = op(x, *tensors, bias, False, activation)
        return out.view(*lead, out.shape[-1])

    return call


def contiguous_rows(t: Tensor, dtype: torch.dtype) -> Tensor:
    """t in this dtype with contiguous rows; a view where it is so already."""
    t = t.to(dtype)
    return t if t.stride(-1) == 1 else t.contiguous()


def define_op(schema: str, run: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Register an op under `hf_blr`, for CUDA and, under Triton's interpreter, for the CPU."""
    name, _, arguments = schema.partition("(")
    # a second import of the package in one process finds the ops there
    if not hasattr(torch.ops.hf_blr, name):
        torch.library.define(f"hf_blr::{name}", f"({arguments}")
        # the CPU is reached under Triton's interpreter only: `dispatch` sees to it
        torch.library.impl(f"hf_blr::{name}", ("cuda", "cpu"), run)
        torch.library.register_fake(f"hf_blr::{name}", fake)
