"""The cast of rows to float8, see `ops.cast`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from hf_blr.ops.rules.device import device_of
from hf_blr.ops.rules.float8 import cast_config
from hf_blr.ops.triton.tuned import launch


@triton.jit
def cast_rows_kernel(
    x_ptr,
    factor_ptr,
    second_ptr,
    outer_ptr,
    rows_ptr,
    scale_ptr,
    K,
    stride_xt,
    stride_rt,
    LARGEST: tl.constexpr,
    SMALLEST_NORM: tl.constexpr,
    FACTORS: tl.constexpr,
    OUTER: tl.constexpr,
    TILES: tl.constexpr,
    BK: tl.constexpr,
):
    """rows[t] = x[t] / scale[t] in float8, with scale[t] = ||x[t]|| / LARGEST; one token a program.

    FACTORS: x is multiplied by factor `[K]` first, and by second `[K]`. OUTER: scale is by outer `[T]`.
    """
    i_t = tl.program_id(0).to(tl.int64)
    x_ptr += i_t * stride_xt
    rows_ptr += i_t * stride_rt
    b_xs = ()
    squares = tl.zeros((BK,), tl.float32)
    for i in tl.static_range(TILES):
        o_k = i * BK + tl.arange(0, BK)
        b_x = tl.load(x_ptr + o_k, mask=o_k < K, other=0.0)
        if FACTORS > 0:
            b_x = b_x.to(tl.float32) * tl.load(factor_ptr + o_k, mask=o_k < K, other=0.0)
        if FACTORS > 1:
            b_x *= tl.load(second_ptr + o_k, mask=o_k < K, other=0.0)
        squares += b_x.to(tl.float32) * b_x.to(tl.float32)
        b_xs = b_xs + (b_x,)
    # NaN must not become the smallest norm
    norm = tl.maximum(tl.sqrt(tl.sum(squares, 0)), SMALLEST_NORM, propagate_nan=tl.PropagateNan.ALL)
    scale = norm / LARGEST
    if OUTER:
        scale *= tl.load(outer_ptr + i_t)
    tl.store(scale_ptr + i_t, scale)
    for i in tl.static_range(TILES):
        o_k = i * BK + tl.arange(0, BK)
        b_row = b_xs[i].to(tl.float32) * (LARGEST / norm)
        tl.store(rows_ptr + o_k, b_row.to(rows_ptr.dtype.element_ty), mask=o_k < K)


def cast_rows(x, largest, smallest_norm, factors=(), outer=None, into=None, rooms=False):
    """(rows `[T, K]` float8_e4m3fn, scale `[T]` float32) of x `[T, K]`.

    factors: at most two `[K]` float32, by which x is multiplied first. outer: `[T]` float32, which goes into scale.
    into: where rows and scale are written, if they are there already. rooms: rows lie as `roomy` lays them.
    """
    tokens, k = x.shape
    if into is None:
        rows = roomy(x, tokens, k) if rooms else x.new_empty(tokens, k, dtype=torch.float8_e4m3fn)
        into = rows, x.new_empty(tokens, dtype=torch.float32)
    rows, scale = into
    factor, second, *_ = *factors, None, None
    if not x.numel():
        return rows, scale

    def run(config):
        cast_rows_kernel[(tokens,)](
            x,
            factor,
            second,
            outer,
            rows,
            scale,
            k,
            x.stride(0),
            rows.stride(0),
            LARGEST=largest,
            SMALLEST_NORM=smallest_norm,
            FACTORS=len(factors),
            OUTER=outer is not None,
            TILES=triton.cdiv(k, config.bc),
            BK=config.bc,
            num_warps=config.warps,
        )

    launch(run, "cast_rows", cast_config(k, device_of(x)), tokens, (k,), x)
    return rows, scale


#: bytes that L2 hands out at once
LINE = 128


def roomy(like, m, length):
    """`[M, L]` float8 whose rows begin where lines do: products read no line twice for it."""
    width = -(-length // LINE) * LINE
    return like.new_empty(m, width, dtype=torch.float8_e4m3fn)[:, :length]
