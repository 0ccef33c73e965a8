"""Few rows times the matrices of their experts: each program reads some rows of the one matrix that its row chose.

No order of the rows and no counts are needed. An expert that several rows chose is read from L2 again.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from hf_blr.ops.rules.device import device_of, vector_width
from hf_blr.ops.rules.experts import rows_config
from hf_blr.ops.triton.bits import Weights, by_place, sum_of_columns, weights_of
from hf_blr.ops.triton.halves import paired


@triton.jit
def expert_rows_kernel(
    x_ptr,
    w_ptr,
    scale_ptr,
    expert_ptr,
    out_ptr,
    Q,
    P,
    C,
    E,
    stride_xs,
    stride_xb,
    stride_we,
    stride_wb,
    stride_wq,
    stride_wc,
    stride_se,
    stride_sb,
    stride_sq,
    FORM: tl.constexpr,
    PER: tl.constexpr,
    SCALED: tl.constexpr,
    VEC: tl.constexpr,
    VEC_W: tl.constexpr,
    BQ: tl.constexpr,
    BC: tl.constexpr,
):
    """out[s, b, q] = sum over p of w[expert of s, b, q, p] x[s, b, p].

    The grid is tiles of Q, blocks, rows. P and strides of x come / VEC; C, the columns of w, and its strides / VEC_W,
    but for that which is 1. SCALED: numbers that share a scale, 0 for whole rows. An expert that is none of E gives
    zeros.
    """
    i_q, i_b, i_s = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    expert = tl.load(expert_ptr + i_s).to(tl.int64)
    known = (expert >= 0) & (expert < E)
    expert = tl.where(known, expert, 0)
    x_ptr += i_s.to(tl.int64) * (stride_xs * VEC) + i_b * (stride_xb * VEC)
    w_ptr += expert * (stride_we * VEC_W) + i_b.to(tl.int64) * (stride_wb * VEC_W)
    o_q = i_q * BQ + tl.arange(0, BQ)
    m_q = o_q < tl.where(known, Q, 0)
    # whichever axis of a matrix lies side by side in memory
    step_q, step_c = stride_wq, stride_wc
    if stride_wc == 1:
        step_q *= VEC_W
    else:
        step_c *= VEC_W
    if FORM != "plain":
        scale_ptr += expert * stride_se + i_b * stride_sb + o_q * stride_sq
    acc = tl.zeros((BQ, BC), tl.float32)
    for first in tl.range(0, C * VEC_W, BC):
        o_p, o_c = first * PER + tl.arange(0, BC * PER), first + tl.arange(0, BC)
        m = m_q[:, None] & (o_c < C * VEC_W)[None, :]
        b_x = by_place(tl.load(x_ptr + o_p, mask=o_p < P * VEC, other=0.0)[None, None, :], FORM)
        b_xs = ()
        for j in tl.static_range(PER):
            b_xs = b_xs + (tl.reshape(b_x[j], (1, BC)),)
        o_w = o_q[:, None] * step_q + o_c[None, :] * step_c
        b_w = tl.load(w_ptr + o_w, mask=m, other=0, eviction_policy="evict_first")
        b_ss = ()
        if SCALED > 0:
            b_ss = b_ss + (tl.load(scale_ptr[:, None] + (o_c * PER // SCALED)[None, :], mask=m, other=0.0),)
        acc += sum_of_columns(paired(b_xs, 0, 1, FORM, PER), (b_w,), b_ss, 0, 1, FORM, PER, SCALED)
    b_out = tl.sum(acc, 1)
    if FORM != "plain" and SCALED == 0:
        b_out *= tl.load(scale_ptr, mask=m_q, other=0.0).to(tl.float32)
    out_ptr += (i_s.to(tl.int64) * tl.num_programs(1) + i_b) * Q + o_q
    tl.store(out_ptr, b_out.to(out_ptr.dtype.element_ty), mask=o_q < Q)


def expert_rows(x: Tensor, w: Tensor | Weights, experts: Tensor) -> Tensor:
    """`[S, B, Q]` from x `[S, B, P]` with P side by side, w `[E, B, Q, P]` of any strides and experts `[S]`."""
    w = weights_of(w)
    (rows, blocks, p), q, columns = x.shape, w.shape[2], w.data.shape[-1]
    out = x.new_empty(rows, blocks, q)
    if not out.numel():
        return out
    *strides, across = w.data.stride()
    along = across == 1
    wide = strides[2] if along else across
    vec, vec_w = vector_width(p, *x.stride()[:2]), vector_width(columns, *strides[:2], wide)
    config = rows_config(columns, rows * blocks * q, w.data.element_size(), device_of(x))
    expert_rows_kernel[(triton.cdiv(q, config.rows), blocks, rows)](
        x,
        w.data,
        w.scale,
        # one expert a token, picked from more, is a column of a matrix
        experts.contiguous(),
        out,
        q,
        p // vec,
        columns // vec_w,
        len(w.data),
        *(n // vec for n in x.stride()[:2]),
        *(n // vec_w for n in strides[:2]),
        wide // vec_w if along else 1,
        1 if along else wide // vec_w,
        *w.scale_strides,
        FORM=w.form_on(device_of(x)),
        PER=w.per,
        SCALED=w.group,
        VEC=vec,
        VEC_W=vec_w,
        BQ=config.rows,
        BC=config.length,
        num_warps=config.warps,
    )
    return out
