"""Layers that are a pair of products, out = (x v^T) u^T, trained with all six products of a step in float8 (e4m3).

A tensor is cast once, by rows (`cast.cast_rows`), and the codes are transposed for the products that sum over its other
axis. Where a product sums over the axis along which a scale lies, the scale goes into the other operand before that is
cast. The scales of x and g = d out lie along tokens, those of u and v along the rank, so that what is cast twice is as
narrow as the rank: y and dy, for the product that sums over the rank and for the one that sums over tokens.
"""

# With x = s[t] x8, v = a[r] v8, u = b[r] u8, g = h[t] g8:
#   y  = s x8 v8^T a           out = (y b)8 u8^T
#   dy = h g8 u8 b             dx  = (dy a)8 v8
#   du = g8^T (y h)8           dv  = (dy s)8^T x8

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from hf_blr.ops.cast import plain_cast
from hf_blr.ops.dispatch import check_impl, compute_dtype, current_impl, why_not_triton
from hf_blr.ops.library import contiguous_rows, define_op
from hf_blr.ops.rules.bits import ALIGNED, FLOAT8, missing
from hf_blr.ops.table import implementation_of
from hf_blr.structures import BLRSpec


class Rows(NamedTuple):
    """A matrix `[M, L]`: codes `[M, L]` float8_e4m3fn times scale `[M]` float32."""

    codes: Tensor
    scale: Tensor

    def transposed(self, emulated: bool) -> Rows:
        """The codes' transpose `[L, M]`, without the scale, which the other operand has taken."""
        return Rows(transposed_codes(self.codes, emulated), self.scale.new_ones(self.codes.shape[1]))


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
    # products over tokens take multiples of 16 of them
    rows = F.pad(x.reshape(-1, x.shape[-1]).to(dtype), (0, 0, 0, -tokens % ALIGNED))
    pair = implementation_of(structure).pair
    assert pair is not None
    u, v = pair(*tensors)
    y = Project.apply(rows, contiguous_rows(v, dtype), emulated)
    out = Expand.apply(y, contiguous_rows(u, dtype), emulated)[:tokens]
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


class Project(torch.autograd.Function):
    """x `[T, K]`, v `[R, K]` -> y `[T, R]`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, v: Tensor, emulated: bool) -> Tensor:
        x8, v8 = cast(x, emulated), cast(v, emulated)
        ctx.emulated = emulated
        ctx.save_for_backward(*x8, *v8)
        return product(x8, v8, x.dtype, emulated)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x8, v8 = Rows(*ctx.saved_tensors[:2]), Rows(*ctx.saved_tensors[2:])
        dx = dv = None
        if ctx.needs_input_grad[0]:
            dx = product(cast(dy * v8.scale, ctx.emulated), v8.transposed(ctx.emulated), dy.dtype, ctx.emulated)
        if ctx.needs_input_grad[1]:
            over_tokens = cast((dy * x8.scale[:, None]).T, ctx.emulated)
            dv = product(over_tokens, x8.transposed(ctx.emulated), dy.dtype, ctx.emulated)
        return dx, dv, None


class Expand(torch.autograd.Function):
    """y `[T, R]`, u `[N, R]` -> `[T, N]`."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, u: Tensor, emulated: bool) -> Tensor:
        codes, scale = cast_columns(u, emulated)
        ctx.emulated = emulated
        ctx.save_for_backward(y, codes, scale)
        u8 = Rows(codes, scale.new_ones(codes.shape[0]))
        return product(cast(y * scale, emulated), u8, y.dtype, emulated)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        y, codes, scale = ctx.saved_tensors
        g8 = cast(grad, ctx.emulated)
        dy = du = None
        if ctx.needs_input_grad[0]:
            dy = product(g8, Rows(transposed_codes(codes, ctx.emulated), scale), grad.dtype, ctx.emulated)
        if ctx.needs_input_grad[1]:
            over_tokens = cast((y * g8.scale[:, None]).T, ctx.emulated)
            du = product(g8.transposed(ctx.emulated), over_tokens, grad.dtype, ctx.emulated)
        return dy, du, None


def cast(t: Tensor, emulated: bool) -> Rows:
    """The nearest numbers of float8 to t `[M, L]`, with a scale for each row."""
    if emulated or torch.compiler.is_compiling():
        codes, scale = plain_cast(t)
        # of a transpose they would come as t lies
        return Rows(codes.contiguous(), scale)
    return Rows(*torch.ops.hf_blr.cast_rows(t.contiguous()))


def cast_columns(t: Tensor, emulated: bool) -> tuple[Tensor, Tensor]:
    """(codes `[M, L]`, scale `[L]`) of t `[M, L]`, with a scale for each column."""
    if emulated or torch.compiler.is_compiling():
        codes, scale = plain_cast(t.T)
        return codes.T.contiguous(), scale
    rows = cast(t.T, emulated)
    return transposed_codes(rows.codes, emulated), rows.scale


def transposed_codes(codes: Tensor, emulated: bool) -> Tensor:
    """`[L, M]` of `[M, L]` float8, contiguous."""
    if emulated:
        return codes.T.contiguous()
    found: Tensor = torch.ops.hf_blr.transposed_codes(codes)
    return found


def transpose_kernel(codes: Tensor) -> Tensor:
    from hf_blr.ops.triton.cast import transposed_codes

    found: Tensor = transposed_codes(codes.contiguous())
    return found


def transpose_fake(codes: Tensor) -> Tensor:
    return codes.new_empty(codes.shape[1], codes.shape[0])


def product(a: Rows, b: Rows, dtype: torch.dtype, emulated: bool) -> Tensor:
    """a b^T `[M, N]` in dtype, of a `[M, L]` and b `[N, L]`."""
    if emulated:
        with torch.autocast(a.codes.device.type, enabled=False):
            wide = [operand.codes.float() * operand.scale[:, None] for operand in (a, b)]
            return (wide[0] @ wide[1].T).to(dtype)
    # with a scale a row it gives bfloat16 alone
    scales = a.scale[:, None], b.scale[None, :]
    out = torch._scaled_mm(a.codes, b.codes.T, *scales, out_dtype=torch.bfloat16, use_fast_accum=True)
    return out.to(dtype)


define_op("transposed_codes(Tensor codes) -> Tensor", transpose_kernel, transpose_fake)
