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
#   y  = x8 v8^T               out = s (y a b)8 u8^T
#   dy = h g8 u8 b             dx  = (dy a)8 v8
#   du = g8^T (y s h)8 a       dv  = (dy s)8^T x8
# y is left without the scales of x and v: cuBLAS is an eighth faster without a scale a row where sums are long, and the
# casts multiply in any case.

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

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
    """The outs, y of all without its scales, codes and scale of the stacked v, codes `[R, N]` of each u, its scales."""
    aside = Aside(x.device, not emulated)
    with aside:
        both = [cast_both(u, emulated) for u in us]
    v8, ranks = cast_stacked(vs, emulated), [len(v) for v in vs]
    dtype = vs[0].dtype
    y = product_of_codes(x, v8.codes, unscaled(dtype), emulated)
    aside.join()
    outs = []
    for part, scale, (columns, u8) in zip(y.split(ranks, 1), v8.scale.split(ranks), both, strict=True):
        y8 = cast(part, emulated, (scale, columns.scale), x_scale)
        outs.append(product(y8, u8, dtype, emulated))
    return [*outs, y, *v8, *(columns.codes for columns, _ in both), *(columns.scale for columns, _ in both)]


def pairs_fake(x: Tensor, x_scale: Tensor, vs: Sequence[Tensor], us: Sequence[Tensor], emulated: bool) -> list[Tensor]:
    rank, tokens = sum(len(v) for v in vs), len(x)
    outs = [u.new_empty(tokens, len(u)) for u in us]
    y = us[0].new_empty(tokens, rank, dtype=unscaled(us[0].dtype))
    turned = [x.new_empty(u.shape[::-1]) for u in us]
    return [*outs, y, x.new_empty(rank, x.shape[1]), x_scale.new_empty(rank), *turned, *map(scale_of, turned)]


def unscaled(dtype: torch.dtype) -> torch.dtype:
    """In what y is kept: it goes up to the square of float8's largest number, which float16 does not hold."""
    return torch.bfloat16 if dtype == torch.float16 else dtype


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
    dtype: torch.dtype,
    emulated: bool,
) -> list[Tensor]:
    """dx, dv of all, and each du, of codes and scales; what is not wanted comes empty.

    x and x_ones are what `transposed` makes of x's codes, for dv; y and what follows it are as `pairs` leaves them.
    """
    ranks, g8s = [len(u) for u in us], list(map(Rows, grads, grad_scales))
    dx, dv, *dus = (y.new_empty(0, dtype=dtype) for _ in wanted)
    # first what dx waits for, so that du is beside all the rest
    turning, learning = Aside(y.device, not emulated), Aside(y.device, not emulated)
    with turning:
        v8 = transposed(v, emulated) if wanted[0] else None
    with learning:
        parts = zip(g8s, y.split(ranks, 1), v_scale.split(ranks), strict=True)
        for i, (g8, part, scale) in enumerate(parts):
            if wanted[2 + i]:
                y8 = cast_columns(part, emulated, (x_scale, g8.scale), scale)
                dus[i] = product(transposed(g8.codes, emulated), y8, dtype, emulated)
    if wanted[0] or wanted[1]:
        dy = torch.empty_like(y, dtype=dtype)
        for g8, part, *u8 in zip(g8s, dy.split(ranks, 1), us, u_scales, strict=True):
            product(g8, Rows(*u8), dtype, emulated, part)
    if v8 is not None:
        dy8 = cast(dy, emulated, (v_scale,))
        turning.join()
        dx = product(dy8, v8, dtype, emulated)
    if wanted[1]:
        assert x is not None and x_ones is not None
        dv = product(cast_columns(dy, emulated, (x_scale,)), Rows(x, x_ones), dtype, emulated)
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
    dtype: torch.dtype,
    emulated: bool,
) -> list[Tensor]:
    shapes = [(len(y), v.shape[1]), v.shape, *(u.shape[::-1] for u in us)]
    return [y.new_empty(shape if want else 0, dtype=dtype) for shape, want in zip(shapes, wanted, strict=True)]


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


def product_of_codes(a: Tensor, b: Tensor, dtype: torch.dtype, emulated: bool) -> Tensor:
    """a b^T `[M, N]` in dtype, of codes a `[M, L]` and b `[N, L]`."""
    if emulated:
        with torch.autocast(a.device.type, enabled=False):
            return (a.float() @ b.float().T).to(dtype)
    one = one_on(a.device)
    return torch._scaled_mm(a, b.T, one, one, out_dtype=torch.bfloat16, use_fast_accum=True).to(dtype)


_ones: dict[torch.device, Tensor] = {}


def one_on(device: torch.device) -> Tensor:
    """1 as float32, kept from the first call on that no CUDA graph captures, in whose memory it would lie."""
    found = _ones.get(device)
    if found is None:
        found = torch.ones((), device=device)
        if not (device.type == "cuda" and torch.cuda.is_current_stream_capturing()):
            _ones[device] = found
    return found


define_op("float8_cast(Tensor x, bool emulated) -> (Tensor, Tensor)", cast, lambda x, emulated: cast_fake(x))
define_op(
    "float8_transpose(Tensor codes, bool emulated) -> (Tensor, Tensor)",
    partial(transposed, rooms=False),
    transpose_fake,
)
define_op(
    "float8_pairs(Tensor x, Tensor x_scale, Tensor[] vs, Tensor[] us, bool emulated) -> Tensor[]", pairs, pairs_fake
)
define_op(
    "float8_pairs_backward(Tensor[] grads, Tensor[] grad_scales, Tensor? x, Tensor? x_ones, Tensor x_scale, Tensor y, "
    "Tensor v, Tensor v_scale, Tensor[] us, Tensor[] u_scales, bool[] wanted, ScalarType dtype, bool emulated) "
    "-> Tensor[]",
    pairs_backward,
    pairs_backward_fake,
)
