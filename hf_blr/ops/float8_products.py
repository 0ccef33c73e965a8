"""The six products of a step of out = (x v^T) u^T in float8 (e4m3), as registered ops.

A wide tensor is cast once, by rows, and its codes are transposed for the products that sum over its other axis. Where a
product sums over the axis along which a scale lies, the scale goes into the other operand before that is cast. The
scales of x and g = d out lie along tokens, those of u and v along the rank, so that what is cast twice is as narrow as
the rank: y and dy, for the product that sums over the rank and for the one that sums over tokens.

Compilers see the ops alone: compiled from its parts, the same step gave zeros on an H200 (PyTorch 2.11), where the
parts one by one gave what the reference gives.
"""

# With x = s[t] x8, v = a[r] v8, u = b[r] u8, g = h[t] g8:
#   y  = s x8 v8^T a           out = (y b)8 u8^T
#   dy = h g8 u8 b             dx  = (dy a)8 v8
#   du = g8^T (y h)8           dv  = (dy s)8^T x8

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hf_blr.ops.cast import LARGEST, SMALLEST_NORM, cast_fake, plain_cast
from hf_blr.ops.library import define_op


class Rows(NamedTuple):
    """A matrix `[M, L]`: codes `[M, L]` float8_e4m3fn times scale `[M]` float32."""

    codes: Tensor
    scale: Tensor


def pair(x: Tensor, x_scale: Tensor, v: Tensor, u: Tensor, emulated: bool) -> tuple[Tensor, ...]:
    """(out, y, codes and scale of v, codes `[R, N]` and scale of u's columns), of x's codes and scale."""
    v8, (columns, u8) = cast(v, emulated), cast_both(u, emulated)
    y = product(Rows(x, x_scale), v8, v.dtype, emulated)
    out = product(cast(y, emulated, columns.scale), u8, v.dtype, emulated)
    return out, y, *v8, *columns


def pair_fake(x: Tensor, x_scale: Tensor, v: Tensor, u: Tensor, emulated: bool) -> tuple[Tensor, ...]:
    out, y = v.new_empty(x.shape[0], u.shape[0]), v.new_empty(x.shape[0], v.shape[0])
    return out, y, *cast_fake(v), *cast_fake(u.T.contiguous())


def pair_backward(
    grad: Tensor,
    x: Tensor,
    x_scale: Tensor,
    y: Tensor,
    v: Tensor,
    v_scale: Tensor,
    u: Tensor,
    u_scale: Tensor,
    wanted: Sequence[bool],
    emulated: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dv, du), of codes and scales as `pair` leaves them; what is not wanted comes empty."""
    dtype, g8 = grad.dtype, cast(grad, emulated)
    dx, dv, du = (grad.new_empty(0) for _ in range(3))
    if wanted[0] or wanted[1]:
        dy = product(g8, Rows(u, u_scale), dtype, emulated)
    if wanted[0]:
        dx = product(cast(dy, emulated, v_scale), transposed(v, emulated), dtype, emulated)
    if wanted[1]:
        dv = product(cast_columns(dy, x_scale, emulated), transposed(x, emulated), dtype, emulated)
    if wanted[2]:
        du = product(transposed(g8.codes, emulated), cast_columns(y, g8.scale, emulated), dtype, emulated)
    return dx, dv, du


def pair_backward_fake(grad: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    x, _, _, v, _, u, _, wanted, _ = others
    shapes = (x.shape, v.shape, u.shape[::-1])
    dx, dv, du = (grad.new_empty(shape if want else 0) for shape, want in zip(shapes, wanted, strict=True))
    return dx, dv, du


def cast(t: Tensor, emulated: bool, factor: Tensor | None = None) -> Rows:
    """The nearest numbers of float8 to t `[M, L]` times factor `[L]`, with a scale for each row."""
    if emulated:
        return Rows(*plain_cast(t if factor is None else t.float() * factor))
    from hf_blr.ops.triton.cast import cast_rows

    return Rows(*cast_rows(t.contiguous(), LARGEST, SMALLEST_NORM, factor))


def cast_columns(t: Tensor, factor: Tensor | None, emulated: bool) -> Rows:
    """The nearest numbers of float8 to the transpose `[L, M]` of t `[M, L]` times factor `[M]`."""
    if emulated:
        rows, scale = plain_cast((t if factor is None else t.float() * factor[:, None]).T)
        # they come as t lies
        return Rows(rows.contiguous(), scale)
    from hf_blr.ops.triton.cast_columns import cast_columns

    return Rows(*cast_columns(t.contiguous(), LARGEST, SMALLEST_NORM, factor))


def cast_both(t: Tensor, emulated: bool) -> tuple[Rows, Rows]:
    """(`cast_columns` of t `[M, L]`, the same codes `[M, L]`, whose scale the other operand takes)."""
    if emulated:
        columns = cast_columns(t, None, emulated)
        return columns, transposed(columns.codes, emulated)
    from hf_blr.ops.triton.cast_columns import cast_both

    columns, rows = cast_both(t.contiguous(), LARGEST, SMALLEST_NORM)
    return Rows(*columns), Rows(*rows)


def transposed(codes: Tensor, emulated: bool) -> Rows:
    """`[L, M]` of codes `[M, L]`, whose scale the other operand has taken."""
    if emulated:
        return Rows(codes.T.contiguous(), codes.new_ones(codes.shape[1], dtype=torch.float32))
    from hf_blr.ops.triton.cast_columns import transposed_codes

    return Rows(*transposed_codes(codes.contiguous()))


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


define_op("float8_cast(Tensor x, bool emulated) -> (Tensor, Tensor)", cast, lambda x, emulated: cast_fake(x))
define_op(
    f"float8_pair(Tensor x, Tensor x_scale, Tensor v, Tensor u, bool emulated) -> ({', '.join(['Tensor'] * 6)})",
    pair,
    pair_fake,
)
define_op(
    "float8_pair_backward(Tensor grad, Tensor x, Tensor x_scale, Tensor y, Tensor v, Tensor v_scale, Tensor u, "
    "Tensor u_scale, bool[] wanted, bool emulated) -> (Tensor, Tensor, Tensor)",
    pair_backward,
    pair_backward_fake,
)
