"""Layers that are a pair of products, out = (x v^T) u^T, trained in float8: which can, on what, and their gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from hf_blr.ops import float8_products  # noqa: F401 (defines the ops)
from hf_blr.ops.cast import plain_cast
from hf_blr.ops.dispatch import check_impl, compute_dtype, current_impl, why_not_triton
from hf_blr.ops.library import contiguous_rows
from hf_blr.ops.rules.bits import ALIGNED, FLOAT8, missing
from hf_blr.ops.table import implementation_of
from hf_blr.structures import BLRSpec


def why_not_float8(spec: BLRSpec) -> str | None:
    """None if such a layer can train in float8, else the reason in words."""
    if implementation_of(spec.structure).pair is None:
        return f"{spec.structure} multiplies stacks of blocks, for which PyTorch has no product of float8"
    sizes = (spec.in_features, spec.rank, spec.out_features)
    if any(size % ALIGNED for size in sizes):
        return f"in features, rank and out features must be multiples of {ALIGNED}, got {sizes}"
    return None


#: (structure, tensors, bias) of a layer
Layer = tuple[str, Sequence[Tensor], Tensor | None]


def linear_in_float8(
    structure: str, x: Tensor, tensors: Sequence[Tensor], bias: Tensor | None = None, impl: str | None = None
) -> Tensor:
    """x W^T + bias `[..., N]` with forward and backward in float8: `linears_in_float8` of one layer."""
    return linears_in_float8(x, [(structure, tensors, bias)], impl)[0]


def linears_in_float8(x: Tensor, layers: Sequence[Layer], impl: str | None = None) -> list[Tensor]:
    """x W^T + bias of each layer, with forward and backward in float8.

    Args:
        x: `[..., K]`.
        layers: of which `why_not_float8` says nothing: the structure's name, factors and indices in the order of the
            structure's `kinds`, bias `[N]` or none.
        impl: "triton" multiplies on float8 tensor cores, "reference" the same float8 numbers in float32, on any device;
            "auto" takes the first where the device has it. None is what `use_impl` set.

    Returns:
        `[..., N]` of each layer in x's dtype, differentiable in x, the factors and the bias. Rounding each operand
        costs 2.6 % of error in norm; four are rounded on the way to the output and to each gradient.

    Raises:
        ValueError: for "dense", which has no form in float8, or an unknown name.
        RuntimeError: if "triton" is asked for on a device that does not multiply float8.
    """
    emulated = emulates(x, impl) or not x.numel()
    lead, dtype, tokens = x.shape[:-1], compute_dtype(x), x.numel() // x.shape[-1]
    rows = contiguous_rows(x.reshape(-1, x.shape[-1]), dtype)
    if tokens % ALIGNED:
        # products over tokens take multiples of 16 of them
        rows = F.pad(rows, (0, 0, 0, -tokens % ALIGNED))
    us, vs = zip(*(factors_of(structure, tensors, dtype) for structure, tensors, _ in layers), strict=True)
    # apart from the products, so that compilers make one of those of layers on one x
    codes, scale = narrowed(rows.detach(), emulated)
    # what the backward reads of x, for a v that learns
    learns = torch.is_grad_enabled() and any(v.requires_grad for v in vs)
    turned = torch.ops.hf_blr.float8_transpose(codes, emulated) if learns else (None, None)
    found = []
    for (_, _, bias), out in zip(layers, Pairs.apply(rows, codes, scale, *turned, emulated, *vs, *us), strict=True):
        out = out[:tokens] if bias is None else out[:tokens] + bias.to(dtype)
        found.append(out.view(*lead, out.shape[-1]))
    return found


def factors_of(structure: str, tensors: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """u `[N, R]` and v `[R, K]` of a layer."""
    pair = implementation_of(structure).pair
    assert pair is not None
    return [contiguous_rows(t, dtype) for t in pair(*tensors)]


def emulates(x: Tensor, impl: str | None = None) -> bool:
    """Whether products of float8 numbers run in float32 where x is; raises as `linear_in_float8`."""
    impl = current_impl() if impl is None else check_impl(impl)
    if impl == "dense":
        raise ValueError('impl="dense" has no form in float8; use "auto" or "reference", or train without float8')
    if impl == "reference" or (impl == "auto" and not x.is_cuda):
        return True
    capability = torch.cuda.get_device_capability(x.device) if x.is_cuda else None
    reason = why_not_triton(x, ()) or missing(FLOAT8, capability)
    if reason and impl == "triton":
        raise RuntimeError(f'impl="triton" cannot train in float8: {reason}; use impl="auto" or "reference"')
    return reason is not None


def narrowed(t: Tensor, emulated: bool) -> tuple[Tensor, Tensor]:
    """(codes `[M, L]` float8, scale `[M]` float32) of t `[M, L]`.

    Compiled code gets PyTorch's own operations, which join the kernel that makes t; all other a kernel.
    """
    codes, scale = plain_cast(t) if torch.compiler.is_compiling() else torch.ops.hf_blr.float8_cast(t, emulated)
    # as products read them, however t lies
    return codes.contiguous(), scale


class Pairs(torch.autograd.Function):
    """x `[T, K]`, its codes and scale, their transpose and its scale, each v `[R, K]`, each u `[N, R]` -> outputs."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        codes: Tensor,
        scale: Tensor,
        turned: Tensor | None,
        ones: Tensor | None,
        emulated: bool,
        *factors: Tensor,
    ) -> tuple[Tensor, ...]:
        count = len(factors) // 2
        vs, us = list(factors[:count]), list(factors[count:])
        found = torch.ops.hf_blr.float8_pairs(codes, scale, vs, us, emulated)
        ctx.emulated, ctx.ranks = emulated, [len(v) for v in vs]
        ctx.save_for_backward(turned, ones, scale, *found[count:])
        return tuple(found[:count])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        count = len(grads)
        turned, ones, x_scale, y, v, v_scale, *us = ctx.saved_tensors
        casts = [narrowed(grad, ctx.emulated) for grad in grads]
        learn = ctx.needs_input_grad
        wanted = [learn[0], any(learn[6 : 6 + count]), *learn[6 + count :]]
        dx, dv, *dus = torch.ops.hf_blr.float8_pairs_backward(
            [codes for codes, _ in casts],
            [scale for _, scale in casts],
            turned,
            ones,
            x_scale,
            y,
            v,
            v_scale,
            us[:count],
            us[count:],
            wanted,
            grads[0].dtype,
            ctx.emulated,
        )
        dvs = dv.split(ctx.ranks) if wanted[1] else [None] * count
        found = [t if want else None for t, want in zip([*dvs, *dus], learn[6:], strict=True)]
        return dx if learn[0] else None, None, None, None, None, None, *found
