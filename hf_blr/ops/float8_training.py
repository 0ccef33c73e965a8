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

from hf_blr.ops.cast import cast_fake, cast_kernel, plain_cast
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
        y, *operands = torch.ops.hf_blr.float8_project(x, v, emulated)
        ctx.emulated = emulated
        ctx.save_for_backward(*operands)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        wanted = ctx.needs_input_grad[:2]
        dx, dv = torch.ops.hf_blr.float8_project_backward(dy, *ctx.saved_tensors, wanted, ctx.emulated)
        return dx if wanted[0] else None, dv if wanted[1] else None, None


class Expand(torch.autograd.Function):
    """y `[T, R]`, u `[N, R]` -> `[T, N]`."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, u: Tensor, emulated: bool) -> Tensor:
        out, *operands = torch.ops.hf_blr.float8_expand(y, u, emulated)
        ctx.emulated = emulated
        ctx.save_for_backward(y, *operands)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        wanted = ctx.needs_input_grad[:2]
        dy, du = torch.ops.hf_blr.float8_expand_backward(grad, *ctx.saved_tensors, wanted, ctx.emulated)
        return dy if wanted[0] else None, du if wanted[1] else None, None


# What runs inside of the ops. Compilers see the ops alone: compiled from its parts, the same step gave zeros on an H200
# (PyTorch 2.11), where the parts one by one gave what the reference gives.


def project(x: Tensor, v: Tensor, emulated: bool) -> tuple[Tensor, ...]:
    """(y, codes and scale of x, codes and scale of v)."""
    x8, v8 = cast(x, emulated), cast(v, emulated)
    return product(x8, v8, x.dtype, emulated), *x8, *v8


def project_fake(x: Tensor, v: Tensor, emulated: bool) -> tuple[Tensor, ...]:
    return x.new_empty(x.shape[0], v.shape[0]), *cast_fake(x), *cast_fake(v)


def project_backward(
    dy: Tensor, x: Tensor, x_scale: Tensor, v: Tensor, v_scale: Tensor, wanted: Sequence[bool], emulated: bool
) -> tuple[Tensor, Tensor]:
    """(dx, dv), of codes and scales; what is not wanted comes empty."""
    x8, v8 = Rows(x, x_scale), Rows(v, v_scale)
    dx, dv = dy.new_empty(0), dy.new_empty(0)
    if wanted[0]:
        dx = product(cast(dy * v8.scale, emulated), v8.transposed(emulated), dy.dtype, emulated)
    if wanted[1]:
        over_tokens = cast((dy * x8.scale[:, None]).T, emulated)
        dv = product(over_tokens, x8.transposed(emulated), dy.dtype, emulated)
    return dx, dv


def expand(y: Tensor, u: Tensor, emulated: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(out, codes of u, its scale)."""
    codes, scale = cast_columns(u, emulated)
    u8 = Rows(codes, scale.new_ones(codes.shape[0]))
    return product(cast(y * scale, emulated), u8, y.dtype, emulated), codes, scale


def expand_fake(y: Tensor, u: Tensor, emulated: bool) -> tuple[Tensor, Tensor, Tensor]:
    codes, _ = cast_fake(u)
    return y.new_empty(y.shape[0], u.shape[0]), codes, u.new_empty(u.shape[1], dtype=torch.float32)


def expand_backward(
    grad: Tensor, y: Tensor, codes: Tensor, scale: Tensor, wanted: Sequence[bool], emulated: bool
) -> tuple[Tensor, Tensor]:
    """(dy, du); what is not wanted comes empty."""
    g8 = cast(grad, emulated)
    dy, du = grad.new_empty(0), grad.new_empty(0)
    if wanted[0]:
        dy = product(g8, Rows(transposed_codes(codes, emulated), scale), grad.dtype, emulated)
    if wanted[1]:
        over_tokens = cast((y * g8.scale[:, None]).T, emulated)
        du = product(g8.transposed(emulated), over_tokens, grad.dtype, emulated)
    return dy, du


def backward_fake(grad: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    *operands, wanted, _ = others
    # of the operands, codes and y are matrices
    left, right = (t for t in operands if t.dim() == 2)
    shapes = zip((left.shape, right.shape), wanted, strict=True)
    first, second = (grad.new_empty(shape if want else 0) for shape, want in shapes)
    return first, second


def cast(t: Tensor, emulated: bool) -> Rows:
    """The nearest numbers of float8 to t `[M, L]`, with a scale for each row."""
    if emulated:
        codes, scale = plain_cast(t)
        # of a transpose they would come as t lies
        return Rows(codes.contiguous(), scale)
    return Rows(*cast_kernel(t.contiguous()))


def cast_columns(t: Tensor, emulated: bool) -> tuple[Tensor, Tensor]:
    """(codes `[M, L]`, scale `[L]`) of t `[M, L]`, with a scale for each column."""
    rows = cast(t.T, emulated)
    return transposed_codes(rows.codes, emulated), rows.scale


def transposed_codes(codes: Tensor, emulated: bool) -> Tensor:
    """`[L, M]` of `[M, L]` float8, contiguous."""
    if emulated:
        return codes.T.contiguous()
    from hf_blr.ops.triton import cast as kernels

    found: Tensor = kernels.transposed_codes(codes.contiguous())
    return found


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


define_op(f"float8_project(Tensor x, Tensor v, bool emulated) -> ({', '.join(['Tensor'] * 5)})", project, project_fake)
define_op(
    "float8_project_backward(Tensor dy, Tensor x, Tensor x_scale, Tensor v, Tensor v_scale, bool[] wanted, "
    "bool emulated) -> (Tensor, Tensor)",
    project_backward,
    backward_fake,
)
define_op("float8_expand(Tensor y, Tensor u, bool emulated) -> (Tensor, Tensor, Tensor)", expand, expand_fake)
define_op(
    "float8_expand_backward(Tensor grad, Tensor y, Tensor codes, Tensor scale, bool[] wanted, bool emulated)"
    " -> (Tensor, Tensor)",
    expand_backward,
    backward_fake,
)
