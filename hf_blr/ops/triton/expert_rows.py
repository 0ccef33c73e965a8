"""Few rows times the matrices of their experts: each program reads some rows of the one matrix that its row chose.

No order of the rows and no counts are needed. An expert that several rows chose is read from L2 again.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from hf_blr.ops.rules.device import device_of, vector_width
from hf_blr.ops.rules.experts import rows_config


@triton.jit
def expert_rows_kernel(
    x_ptr,
    w_ptr,
    expert_ptr,
    out_ptr,
    Q,
    P,
    E,
    stride_xs,
    stride_xb,
    stride_we,
    stride_wb,
    stride_wq,
    stride_wp,
    VEC: tl.constexpr,
    BQ: tl.constexpr,
    BP: tl.constexpr,
):
    """out[s, b, q] = sum over p of w[expert of s, b, q, p] x[s, b, p]. P and strides of x come / VEC, and those of w.

    The grid is tiles of Q, blocks, rows. A row whose expert is none of E gets zeros.
    """
    i_q, i_b, i_s = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    expert = tl.load(expert_ptr + i_s).to(tl.int64)
    known = (expert >= 0) & (expert < E)
    x_ptr += i_s.to(tl.int64) * (stride_xs * VEC) + i_b * (stride_xb * VEC)
    w_ptr += tl.where(known, expert, 0) * (stride_we * VEC) + i_b.to(tl.int64) * (stride_wb * VEC)
    o_q, o_p = i_q * BQ + tl.arange(0, BQ), tl.arange(0, BP)
    m_q = o_q < tl.where(known, Q, 0)
    # whichever axis of a matrix lies side by side in memory
    step_q, step_p = stride_wq, stride_wp
    if stride_wp == 1:
        step_q *= VEC
    else:
        step_p *= VEC
    acc = tl.zeros((BQ, BP), tl.float32)
    for first in tl.range(0, P * VEC, BP):
        m_p = first + o_p < P * VEC
        b_x = tl.load(x_ptr + first + o_p, mask=m_p, other=0.0)
        o_w = o_q[:, None] * step_q + (first + o_p)[None, :] * step_p
        b_w = tl.load(w_ptr + o_w, mask=m_q[:, None] & m_p[None, :], other=0.0, eviction_policy="evict_first")
        acc += b_w.to(tl.float32) * b_x.to(tl.float32)[None, :]
    out_ptr += (i_s.to(tl.int64) * tl.num_programs(1) + i_b) * Q + o_q
    tl.store(out_ptr, tl.sum(acc, 1).to(out_ptr.dtype.element_ty), mask=o_q < Q)


def expert_rows(x: Tensor, w: Tensor, experts: Tensor) -> Tensor:
    """`[S, B, Q]` from x `[S, B, P]` with P side by side, w `[E, B, Q, P]` of any strides and experts `[S]`."""
    (rows, blocks, p), q = x.shape, w.shape[2]
    out = x.new_empty(rows, blocks, q)
    if not out.numel():
        return out
    along = w.stride()[3] == 1
    wide = w.stride()[2 if along else 3]
    vec = vector_width(p, *x.stride()[:2], w.stride()[0], w.stride()[1], wide)
    config = rows_config(p, rows * blocks * q, x.element_size(), device_of(x))
    expert_rows_kernel[(triton.cdiv(q, config.rows), blocks, rows)](
        x,
        w,
        experts,
        out,
        q,
        p // vec,
        len(w),
        *(n // vec for n in (*x.stride()[:2], *w.stride()[:2])),
        wide // vec if along else 1,
        1 if along else wide // vec,
        VEC=vec,
        BQ=config.rows,
        BP=config.length,
        num_warps=config.warps,
    )
    return out
