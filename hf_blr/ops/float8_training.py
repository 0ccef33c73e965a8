"""Layers that are a pair of products, out = (x v^T) u^T, trained in float8: which can, on what, and their gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from hf_blr.ops import float8_products  # noqa: F401 (defines the ops)
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


def linear_in_float8(
    structure: str, x: Tensor, tensors: Sequence[Tensor], bias: Tensor | None = None, impl: str | None = None
) -> Tensor:
    """x W^T + bias with forward and backward in float8, for a layer of which `why_not_float8` says nothing.

    Args:
        structure: its name.
        x: `[..., K]`.
        tensors: factors and indices in the order of the structure's `kinds`.
        bias: `[N]`, or none.
        impl: "triton" multiplies on float8 tensor cores, "reference" the same float8 numbers in float32, on any device;
            "auto" takes the first where the device has it. None is what `use_impl` set.

    Returns:
        `[..., N]` in x's dtype, differentiable in x, the factors and the bias. Rounding each operand costs 2.6 % of
        error in norm; four are rounded on the way to the output and to each gradient.

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
    pair = implementation_of(structure).pair
    assert pair is not None
    u, v = (contiguous_rows(t, dtype) for t in pair(*tensors))
    # by itself, so that compilers make one of those of q, k and v
    codes, scale = torch.ops.hf_blr.float8_cast(rows.detach(), emulated)
    out = Pair.apply(rows, codes, scale, v, u, emulated)[:tokens]
    out = out if bias is None else out + bias.to(dtype)
    return out.view(*lead, out.shape[-1])


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


class Pair(torch.autograd.Function):
    """x `[T, K]`, its codes and scale, v `[R, K]`, u `[N, R]` -> `[T, N]`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, codes: Tensor, scale: Tensor, v: Tensor, u: Tensor, emulated: bool) -> Tensor:
        out, *kept = torch.ops.hf_blr.float8_pair(codes, scale, v, u, emulated)
        ctx.emulated = emulated
        ctx.save_for_backward(codes, scale, *kept)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        wanted = [ctx.needs_input_grad[i] for i in (0, 3, 4)]
        found = torch.ops.hf_blr.float8_pair_backward(grad, *ctx.saved_tensors, wanted, ctx.emulated)
        dx, dv, du = (t if want else None for t, want in zip(found, wanted, strict=True))
        return dx, None, None, dv, du, None
