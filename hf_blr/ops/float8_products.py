"""The products of a step of layers out = (x v^T) u^T on one x in float8 (e4m3), as registered ops.

A wide tensor is cast once, by rows, and its codes are transposed for the products that sum over its other axis. Where a
product sums over the axis along which a scale lies, the scale goes into the other operand before that is cast. The
scales of x and g = d out lie along tokens, those of u and v along the rank, so that what is cast twice is as narrow as
the rank: y and dy, for the product that sums over the rank and for the one that sums over tokens.

The v of several layers lie under each other, and what is made of them side by side: y, dx and dv are one product each.

Compilers see the ops and the casts of x and g, which join the kernels that make them, and nothing of the products:
compiled from all of its parts, the same step gave zeros on an H200 (PyTorch 2.11), where the parts one by one gave what
the reference gives.
"""

# With x = s[t] x8, v = a[r] v8, u = b[r] u8, g = h[t] g8:
#   y  = s x8 v8^T a           out = (y b)8 u8^T
#   dy = h g8 u8 b             dx  = (dy a)8 v8
#   du = g8^T (y h)8           dv  = (dy s)8^T x8

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hf_blr.ops.aside import Aside
from hf_blr.ops.cast import cast_fake
from hf_blr.ops.float8_casts import (
    Rows,
    cast,
    cast_both,
    cast_columns,
    cast_stacked,
    transpose_fake,
    transposed,
)
from hf_blr.ops.library import define_op


def pairs(x: Tensor, x_scale: Tensor, vs: Sequence[Tensor], us: Sequence[Tensor], emulated: bool) -> list[Tensor]:
    """The outs, y of all, codes and scale of the stacked v, codes `[R, N]` of each u, scales of their columns."""
    aside = Aside(x.device, not emulated)
    with aside:
        both = [cast_both(u, emulated) for u in us]
    v8 = cast_stacked(vs, emulated)
    y = product(Rows(x, x_scale), v8, vs[0].dtype, emulated)
    aside.join()
    parts = zip(y.split([len(v) for v in vs], 1), both, strict=True)
    outs = [product(cast(part, emulated, columns.scale), u8, y.dtype, emulated) for part, (columns, u8) in parts]
    return [*outs, y, *v8, *(columns.codes for columns, _ in both), *(columns.scale for columns, _ in both)]


def pairs_fake(x: Tensor, x_scale: Tensor, vs: Sequence[Tensor], us: Sequence[Tensor], emulated: bool) -> list[Tensor]:
    rank, tokens = sum(len(v) for v in vs), len(x)
    outs, y = [u.new_empty(tokens, len(u)) for u in us], us[0].new_empty(tokens, rank)
    turned = [x.new_empty(u.shape[::-1]) for u in us]
    return [*outs, y, x.new_empty(rank, x.shape[1]), x_scale.new_empty(rank), *turned, *map(scale_of, turned)]


def scale_of(codes: Tensor) -> Tensor:
    return codes.new_empty(len(codes), dtype=torch.float32)


def pairs_backward(
    grads: Sequence[Tensor],
    grad_scales: Sequence[Tensor],
    x: Tensor | None,
    x_ones: Tensor | None,
    x_scale: Tensor,
    y: Tensor,
    v: Tensor,
    v_scale: Tensor,
    us: Sequence[Tensor],
    u_scales: Sequence[Tensor],
    wanted: Sequence[bool],
    emulated: bool,
) -> list[Tensor]:
    """dx, dv of all, and each du, of codes and scales; what is not wanted comes empty.

    x and x_ones are what `transposed` makes of x's codes, for dv; y and what follows it are as `pairs` leaves them.
    """
    ranks, g8s = [len(u) for u in us], list(map(Rows, grads, grad_scales))
    dx, dv, *dus = (y.new_empty(0) for _ in wanted)
    # first what dx waits for, so that du is beside all the rest
    turning, learning = Aside(y.device, not emulated), Aside(y.device, not emulated)
    with turning:
        v8 = transposed(v, emulated) if wanted[0] else None
    with learning:
        for i, (g8, part) in enumerate(zip(g8s, y.split(ranks, 1), strict=True)):
            if wanted[2 + i]:
                y8 = cast_columns(part, g8.scale, emulated)
                dus[i] = product(transposed(g8.codes, emulated), y8, y.dtype, emulated)
    if wanted[0] or wanted[1]:
        dy = torch.empty_like(y)
        for g8, part, *u8 in zip(g8s, dy.split(ranks, 1), us, u_scales, strict=True):
            product(g8, Rows(*u8), y.dtype, emulated, part)
    if v8 is not None:
        dy8 = cast(dy, emulated, v_scale)
        turning.join()
        dx = product(dy8, v8, y.dtype, emulated)
    if wanted[1]:
        assert x is not None and x_ones is not None
        dv = product(cast_columns(dy, x_scale, emulated), Rows(x, x_ones), y.dtype, emulated)
    learning.join()
    return [dx, dv, *dus]


def pairs_backward_fake(
    grads: Sequence[Tensor],
    grad_scales: Sequence[Tensor],
    x: Tensor | None,
    x_ones: Tensor | None,
    x_scale: Tensor,
    y: Tensor,
    v: Tensor,
    v_scale: Tensor,
    us: Sequence[Tensor],
    u_scales: Sequence[Tensor],
    wanted: Sequence[bool],
    emulated: bool,
) -> list[Tensor]:
    shapes = [(len(y), v.shape[1]), v.shape, *(u.shape[::-1] for u in us)]
    return [y.new_empty(shape if want else 0) for shape, want in zip(shapes, wanted, strict=True)]


def product(a: Rows, b: Rows, dtype: torch.dtype, emulated: bool, into: Tensor | None = None) -> Tensor:
    """a b^T `[M, N]` in dtype, of a `[M, L]` and b `[N, L]`; into: what it is written to."""
    if emulated:
        with torch.autocast(a.codes.device.type, enabled=False):
            wide = [operand.codes.float() * operand.scale[:, None] for operand in (a, b)]
            found = (wide[0] @ wide[1].T).to(dtype)
        return found if into is None else into.copy_(found)
    # with a scale a row it gives bfloat16 alone
    scales = a.scale[:, None], b.scale[None, :]
    straight = into if dtype == torch.bfloat16 else None
    found = torch._scaled_mm(a.codes, b.codes.T, *scales, out_dtype=torch.bfloat16, use_fast_accum=True, out=straight)
    return found.to(dtype) if into is None or straight is not None else into.copy_(found)


define_op("float8_cast(Tensor x, bool emulated) -> (Tensor, Tensor)", cast, lambda x, emulated: cast_fake(x))
define_op("float8_transpose(Tensor codes, bool emulated) -> (Tensor, Tensor)", transposed, transpose_fake)
define_op(
    "float8_pairs(Tensor x, Tensor x_scale, Tensor[] vs, Tensor[] us, bool emulated) -> Tensor[]", pairs, pairs_fake
)
define_op(
    "float8_pairs_backward(Tensor[] grads, Tensor[] grad_scales, Tensor? x, Tensor? x_ones, Tensor x_scale, Tensor y, "
    "Tensor v, Tensor v_scale, Tensor[] us, Tensor[] u_scales, bool[] wanted, bool emulated) -> Tensor[]",
    pairs_backward,
    pairs_backward_fake,
)
