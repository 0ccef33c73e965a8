"""The registered ops: one per structure and direction, with schema and fake, run by `ops.triton`.

`torch.compile` sees each module call as one op, without a graph break; Triton is imported when one first
runs. The autograd Functions stand outside the ops, which costs less per call than autograd registered inside.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hf_blr.ops.activations import activated
from hf_blr.ops.dispatch import compute_dtype, few_tokens


def low_rank(x: Tensor, u: Tensor, v: Tensor, bias: Tensor | None, activation: str = "") -> Tensor:
    """x `[..., K]` -> `[..., N]`; differentiable."""
    return _call(_LowRank, torch.ops.hf_blr.low_rank, x, (u, v), bias, activation)


def pivoted(x: Tensor, u: Tensor, c: Tensor, order: Tensor, bias: Tensor | None, activation: str = "") -> Tensor:
    """x `[..., K]` -> `[..., N]`; differentiable in all but order."""
    return _call(_Pivoted, torch.ops.hf_blr.pivoted, x, (u, c, order), bias, activation)


def monarch(x: Tensor, u: Tensor, v: Tensor, bias: Tensor | None, activation: str = "") -> Tensor:
    """x `[..., K]` -> `[..., N]`; differentiable."""
    return _call(_Monarch, torch.ops.hf_blr.monarch, x, (u, v), bias, activation)


def blast(x: Tensor, u: Tensor, s: Tensor, v: Tensor, bias: Tensor | None, activation: str = "") -> Tensor:
    """x `[..., K]` -> `[..., N]`; differentiable."""
    return _call(_Blast, torch.ops.hf_blr.blast, x, (u, s, v), bias, activation)


def _call(function, op, x: Tensor, factors: tuple[Tensor, ...], bias: Tensor | None, activation: str) -> Tensor:
    lead, dtype = x.shape[:-1], compute_dtype(x)
    x = contiguous_rows(x.reshape(-1, x.shape[-1]), dtype)
    # indices keep their dtype
    factors = tuple(contiguous_rows(f, dtype if f.is_floating_point() else f.dtype) for f in factors)
    bias = None if bias is None else contiguous_rows(bias, dtype)
    inputs = (x, *factors) if bias is None else (x, *factors, bias)
    # without a gradient to compute, decode is spared the Function: some 200 calls per token in a model
    if torch.is_grad_enabled() and any(t.requires_grad for t in inputs):
        out = activated(function.apply(x, *factors, bias), activation)
    else:
        out, _ = op(x, *factors, bias, False, activation)
    return out.view(*lead, out.shape[-1])


def contiguous_rows(t: Tensor, dtype: torch.dtype) -> Tensor:
    """t in this dtype with contiguous rows; a view where it is so already."""
    t = t.to(dtype)
    return t if t.stride(-1) == 1 else t.contiguous()


# The gradients. With g = d out, g[i] its output blocks, and y kept from the forward or computed again:
#   dz[i] = g[i] u[i]          du[i] = g[i]^T z[i]
#   dy    = mix^T(dz)          ds[i,j] = sum over t of dz[i] * y[j]    (BLAST; else dy is dz, blocks swapped)
#   dx[j] = dy[j] v[j]         dv[j] = dy[j]^T x[j]
# Pivoted: dx[order] = [dy, dy c] and dc = dy^T x[order[R:]].


class _LowRank(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, u, v, bias):
        return _forward(ctx, torch.ops.hf_blr.low_rank, bias, x, u, v)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return _gradients(ctx, torch.ops.hf_blr.low_rank_backward, grad)


class _Pivoted(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, u, c, order, bias):
        # y is never larger than x, so by the rule of `_forward` it is kept; the inputs that c multiplies are as good
        # as x itself, which is kept anyway: gathering them again is one pass over memory
        out, y = torch.ops.hf_blr.pivoted(x, u, c, order, bias, not few_tokens(x), "")
        ctx.save_for_backward(x, u, c, order, y)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        *needs, _, need_bias = ctx.needs_input_grad
        dx, du, dc, dbias = _gradients(ctx, torch.ops.hf_blr.pivoted_backward, grad, (*needs, need_bias))
        return dx, du, dc, None, dbias


class _Monarch(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, u, v, bias):
        return _forward(ctx, torch.ops.hf_blr.monarch, bias, x, u, v)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return _gradients(ctx, torch.ops.hf_blr.monarch_backward, grad)


class _Blast(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, u, s, v, bias):
        return _forward(ctx, torch.ops.hf_blr.blast, bias, x, u, s, v)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return _gradients(ctx, torch.ops.hf_blr.blast_backward, grad)


def _forward(ctx, op, bias, x, *factors):
    # y is worth its memory while it is no larger than x, which is kept anyway: computing it again is a sixth
    # of the layer's work; the kernels for few tokens never write it
    y_width = factors[-1].numel() // x.shape[1] * _blocks(factors[-1])
    keep = y_width <= x.shape[1] and not few_tokens(x)
    out, y = op(x, *factors, bias, keep, "")
    ctx.save_for_backward(x, *factors, y)
    return out


def _blocks(v: Tensor) -> int:
    return 1 if v.dim() == 2 else v.shape[0]


def _gradients(ctx, op, grad: Tensor, needs_grad: tuple[bool, ...] | None = None):
    *needs, need_bias = ctx.needs_input_grad if needs_grad is None else needs_grad
    grad = contiguous_rows(grad, grad.dtype)
    grads = op(grad, *ctx.saved_tensors, needs) if any(needs) else (None,) * len(needs)
    dbias = grad.sum(0) if need_bias else None
    return *(g if need else None for g, need in zip(grads, needs, strict=True)), dbias


def _forward_fake(x, u, *others):
    *_, v, _bias, keep, _activation = others
    out = x.new_empty(x.shape[0], u.shape[0] if u.dim() == 2 else u.shape[0] * u.shape[1])
    y = x.new_empty(0) if not keep else x.new_empty(*v.shape[:-2], x.shape[0], v.shape[-2])
    return out, y


def _pivoted_fake(x, u, c, order, bias, keep, activation):
    return _forward_fake(x, u, c, bias, keep, activation)


def _backward_fake(grad, *inputs):
    *tensors, _, needs = inputs
    pairs = zip(tensors, needs, strict=True)
    return tuple(torch.empty_like(t) if need else t.new_empty(0) for t, need in pairs)


def _pivoted_backward_fake(grad, x, u, c, order, y, needs):
    return _backward_fake(grad, x, u, c, y, needs)


def _low_rank(x, u, v, bias, keep, activation):
    from hf_blr.ops.triton.low_rank import low_rank_fwd

    return low_rank_fwd(x, u, v, bias, keep, activation)


def _low_rank_backward(grad, x, u, v, y, needs):
    from hf_blr.ops.triton.low_rank import low_rank_bwd

    return low_rank_bwd(grad, x, u, v, y, needs)


def _pivoted(x, u, c, order, bias, keep, activation):
    from hf_blr.ops.triton.pivoted import pivoted_fwd

    return pivoted_fwd(x, u, c, order, bias, keep, activation)


def _pivoted_backward(grad, x, u, c, order, y, needs):
    from hf_blr.ops.triton.pivoted import pivoted_bwd

    return pivoted_bwd(grad, x, u, c, order, y, needs)


def _monarch(x, u, v, bias, keep, activation):
    from hf_blr.ops.triton.monarch import monarch_fwd

    return monarch_fwd(x, u, v, bias, keep, activation)


def _monarch_backward(grad, x, u, v, y, needs):
    from hf_blr.ops.triton.monarch import monarch_bwd

    return monarch_bwd(grad, x, u, v, y, needs)


def _blast(x, u, s, v, bias, keep, activation):
    from hf_blr.ops.triton.blast import blast_fwd

    return blast_fwd(x, u, s, v, bias, keep, activation)


def _blast_backward(grad, x, u, s, v, y, needs):
    from hf_blr.ops.triton.blast import blast_bwd

    return blast_bwd(grad, x, u, s, v, y, needs)


# `keep`: also return the first stage's result y for the backward; without it y comes back empty.
# `needs` says which gradients are wanted; an unwanted one comes back empty, as y does where it was not kept.
_UV, _USV = "Tensor x, Tensor u, Tensor v", "Tensor x, Tensor u, Tensor s, Tensor v"
_UC = "Tensor x, Tensor u, Tensor c, Tensor order"
_FORWARD, _BACKWARD = (
    "Tensor? bias, bool keep, str activation) -> (Tensor, Tensor)",
    "Tensor y, bool[] needs) -> (Tensor, Tensor, Tensor",
)
_OPS = {
    f"low_rank({_UV}, {_FORWARD}": (_low_rank, _forward_fake),
    f"pivoted({_UC}, {_FORWARD}": (_pivoted, _pivoted_fake),
    f"monarch({_UV}, {_FORWARD}": (_monarch, _forward_fake),
    f"blast({_USV}, {_FORWARD}": (_blast, _forward_fake),
    f"low_rank_backward(Tensor grad, {_UV}, {_BACKWARD})": (_low_rank_backward, _backward_fake),
    f"pivoted_backward(Tensor grad, {_UC}, {_BACKWARD})": (_pivoted_backward, _pivoted_backward_fake),
    f"monarch_backward(Tensor grad, {_UV}, {_BACKWARD})": (_monarch_backward, _backward_fake),
    f"blast_backward(Tensor grad, {_USV}, {_BACKWARD}, Tensor)": (_blast_backward, _backward_fake),
}


def define_ops(ops: dict[str, tuple]):
    """Register {schema: (implementation, fake)} under `hf_blr`."""
    for schema, (run, fake) in ops.items():
        name, _, arguments = schema.partition("(")
        # a second import of the package in one process finds the ops there
        if not hasattr(torch.ops.hf_blr, name):
            torch.library.define(f"hf_blr::{name}", f"({arguments}")
            # the CPU is reached under Triton's interpreter only: `dispatch` sees to it
            torch.library.impl(f"hf_blr::{name}", ("cuda", "cpu"), run)
            torch.library.register_fake(f"hf_blr::{name}", fake)


define_ops(_OPS)
