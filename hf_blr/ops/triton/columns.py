"""Columns of a matrix in another order: the inputs of pivoted layers into pivots and the rest, and gradients back."""

from __future__ import annotations

import triton
import triton.language as tl

from hf_blr.ops.rules.columns import column_config
from hf_blr.ops.rules.device import device_of, vector_width
from hf_blr.ops.triton.tiles import is_feature
from hf_blr.ops.triton.tuned import launch


@triton.jit
def columns_kernel(
    x_ptr,
    order_ptr,
    y_ptr,
    rest_ptr,
    T,
    K,
    stride_xt,
    R,
    REST,
    stride_yt,
    stride_rt,
    SCATTER: tl.constexpr,
    VEC: tl.constexpr,
    BT: tl.constexpr,
    BC: tl.constexpr,
):
    """y = x[:, order[:R]] and rest = x[:, order[R:]], or with SCATTER the way back.

    Indices outside of x's K columns read zeros and write nothing. Sizes and strides of y and rest come / VEC.
    Columns are the inner part of the grid: y and rest take x's cache lines from L2 one after the other.
    """
    pivot_tiles, tiles = tl.cdiv(R * VEC, BC), tl.cdiv(R * VEC, BC) + tl.cdiv(REST * VEC, BC)
    i_t, i_c = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    # a tile lies in one of the two, so that its own side is read or written in wide pieces
    is_rest = i_c >= pivot_tiles
    part_ptr = tl.where(is_rest, rest_ptr, y_ptr)
    width, stride = tl.where(is_rest, REST, R) * VEC, tl.where(is_rest, stride_rt, stride_yt) * VEC
    order_ptr += tl.where(is_rest, R, 0) * VEC
    first = tl.where(is_rest, i_c - pivot_tiles, i_c) * BC
    o_t = (i_t * BT + tl.arange(0, BT)).to(tl.int64)
    o_c = first + tl.arange(0, BC)
    m_c = o_c < width
    m = (o_t < T)[:, None] & m_c[None, :]
    b_o = tl.load(order_ptr + o_c, mask=m_c, other=0)
    m_x = m & is_feature(b_o, K)[None, :]
    x_ptr += o_t[:, None] * stride_xt + b_o[None, :]
    part_ptr += o_t[:, None] * stride + o_c[None, :]
    if SCATTER:
        tl.store(x_ptr, tl.load(part_ptr, mask=m), mask=m_x)
    else:
        tl.store(part_ptr, tl.load(x_ptr, mask=m_x, other=0.0), mask=m)


def gather_columns(x, order, r):
    """y `[T, r]` = x[:, order[:r]] and rest `[T, len(order) - r]` = x[:, order[r:]], of x `[T, K]`.

    Rows are not padded: where an odd size keeps cuBLAS from wide loads of these, it does so of u and c as well.
    """
    y, rest = x.new_empty(x.shape[0], r), x.new_empty(x.shape[0], len(order) - r)
    move_columns(x, y, rest, order, scatter=False)
    return y, rest


def scatter_columns(y, rest, order):
    """x `[T, K]` with x[:, order] = [y, rest], of y `[T, R]` and rest `[T, K - R]`."""
    x = y.new_empty(y.shape[0], len(order))
    move_columns(x, y, rest, order, scatter=True)
    return x


def move_columns(x, y, rest, order, scatter):
    """Fill y and rest from x, or x from them with `scatter`."""
    tokens, sizes = x.shape[0], (y.shape[1], rest.shape[1], y.stride(0), rest.stride(0))
    if not x.numel() or not len(order):
        return
    vec = vector_width(*sizes)

    def run(config):
        tiles = sum(triton.cdiv(size, config.bc) for size in sizes[:2])
        columns_kernel[(triton.cdiv(tokens, config.bt) * tiles,)](
            x,
            order,
            y,
            rest,
            tokens,
            x.shape[1],
            x.stride(0),
            *(n // vec for n in sizes),
            SCATTER=scatter,
            VEC=vec,
            BT=config.bt,
            BC=config.bc,
            num_warps=config.warps,
        )

    launch(run, "columns", column_config(device_of(x)), tokens, (*sizes[:2], scatter), x)
