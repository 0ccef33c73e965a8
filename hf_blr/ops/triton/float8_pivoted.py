"""Pivoted in float8: a gather of the inputs that are cast already, and low-rank's products."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from hf_blr.ops.rules.device import device_of
from hf_blr.ops.rules.float8 import gather_config
from hf_blr.ops.triton.float8_gemm import LONGER, peak_of_codes
from hf_blr.ops.triton.float8_low_rank import both_stages
from hf_blr.ops.triton.tiles import is_feature, wait_for_previous
from hf_blr.ops.triton.tuned import launch


@triton.jit
def gather_bytes_kernel(
    x_ptr,
    order_ptr,
    y_ptr,
    rest_ptr,
    T,
    K,
    R,
    stride_xt,
    stride_yt,
    stride_rt,
    PDL: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
):
    """y = x[:, order[:R]] and rest = x[:, order[R:]] of bytes; indices outside of x's K columns give zeros.

    A program takes BT tokens, one after the other, each whole: its bytes change places in shared memory.
    """
    i_t = tl.program_id(0)
    o_k = tl.arange(0, BK)
    m_k = o_k < K
    b_o = tl.load(order_ptr + o_k, mask=m_k, other=0).to(tl.int32)
    m_o = m_k & is_feature(b_o, K)
    b_o = tl.where(m_o, b_o, 0)
    wait_for_previous(PDL)
    for i in range(i_t * BT, tl.minimum(i_t * BT + BT, T)):
        o_t = tl.cast(i, tl.int64)
        b_x = tl.load(x_ptr + o_t * stride_xt + o_k, mask=m_k, other=0)
        b_x = tl.where(m_o, tl.gather(b_x, b_o, 0), 0).to(x_ptr.dtype.element_ty)
        tl.store(y_ptr + o_t * stride_yt + o_k, b_x, mask=m_k & (o_k < R))
        tl.store(rest_ptr + o_t * stride_rt + (o_k - R), b_x, mask=m_k & (o_k >= R))


def gather(x, order, r):
    """x[:, order[:r]] and x[:, order[r:]] of x `[T, K]` float8."""
    tokens, k = x.shape
    y, rest, device = x.new_empty(tokens, r), x.new_empty(tokens, k - r), device_of(x)
    if not tokens:
        return y, rest

    def run(config):
        gather_bytes_kernel[(triton.cdiv(tokens, config.bt),)](
            x.view(torch.uint8),
            order,
            y.view(torch.uint8),
            rest.view(torch.uint8),
            tokens,
            k,
            r,
            x.stride(0),
            r,
            k - r,
            PDL=device.has_pdl,
            BT=config.bt,
            BK=config.bc,
            num_warps=config.warps,
            **device.launch_options,
        )

    launch(run, "gather_bytes", gather_config(tokens, k, device), tokens, (k, r), x)
    return y, rest


def forward(x, x_scale, tensors, scales, bias, dtype, activation):
    """x `[T, K]` float8 with x_scale `[T]` -> `[T, N]` in dtype.

    tensors (u `[N, R]`, c `[R, K - R]`) float8, with scales `[.., 1]`, and order `[K]`.
    """
    (u, c, order), (u_scale, c_scale, _) = tensors, scales
    pivots, rest = gather(x, order, u.shape[1])
    peak = peak_of_codes(c.shape[1], c_scale.view(1, 1, -1), extra=LONGER)
    return both_stages(rest, x_scale, u, u_scale, c, c_scale, peak, pivots, bias, dtype, activation)
