"""BLAST's mix while the last stage loads its operand."""

import triton
import triton.language as tl

from hf_blr.ops.triton.block_gemm import descriptor, fits_tma
from hf_blr.ops.triton.launch import GemmConfig, device_of, dot_precision, pdl_option
from hf_blr.ops.triton.tiles import load_tile, wait_for_previous


@triton.jit
def blast_expand_kernel(
    y,
    u,
    s_ptr,
    out_ptr,
    bias_ptr,
    T,
    Q,
    R,
    stride_yj,
    stride_yt,
    stride_si,
    stride_sj,
    stride_ui,
    stride_uq,
    stride_ot,
    B1: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    TMA: tl.constexpr,
    PDL: tl.constexpr,
    PRECISION: tl.constexpr,
    LOW: tl.constexpr,
    BT: tl.constexpr,
    BQ: tl.constexpr,
    BR: tl.constexpr,
):
    """out[t, i*Q + q] = sum_r (sum_j s[i,j,r] y[j,t,r]) u[i,q,r] + bias, y `[B1, T, R]`, u `[B2, Q, R]`."""
    i_n, i_t = tl.program_id(0), tl.program_id(1)
    tiles_q = tl.cdiv(Q, BQ)
    i_i, i_q = i_n // tiles_q, i_n % tiles_q
    wait_for_previous(PDL)
    acc = tl.zeros((BT, BQ), tl.float32)
    for step in range(0, tl.cdiv(R, BR)):
        o_r = step * BR + tl.arange(0, BR)
        m_r = o_r < R
        b_u = load_tile(u, i_i, i_q * BQ, step * BR, Q, R, stride_ui, stride_uq, 1, BQ, BR, TMA)
        if LOW:
            b_z = tl.zeros((BT, BR), b_u.dtype)
        else:
            b_z = tl.zeros((BT, BR), tl.float32)
        for j in tl.static_range(B1):
            b_s = tl.load(s_ptr + i_i * stride_si + j * stride_sj + o_r, mask=m_r, other=0.0)
            b_y = load_tile(y, j, i_t * BT, step * BR, T, R, stride_yj, stride_yt, 1, BT, BR, TMA)
            if LOW:
                b_z += b_s[None, :] * b_y
            else:
                b_z += b_s.to(tl.float32)[None, :] * b_y.to(tl.float32)
        acc = tl.dot(b_z.to(b_u.dtype), b_u.T, acc, input_precision=PRECISION)
    o_t = i_t * BT + tl.arange(0, BT)
    o_q = i_q * BQ + tl.arange(0, BQ)
    if HAS_BIAS:
        acc += tl.load(bias_ptr + i_i * Q + o_q, mask=o_q < Q, other=0.0).to(tl.float32)[None, :]
    o = o_t.to(tl.int64)[:, None] * stride_ot + (i_i * Q + o_q)[None, :]
    tl.store(out_ptr + o, acc.to(out_ptr.dtype.element_ty), mask=(o_t < T)[:, None] & (o_q < Q)[None, :])


def blast_expand(y, u, s, bias, out, config, low=False):
    (b2, q, r), (b1, tokens, _) = u.shape, y.shape
    device = device_of(y)
    tma = device.has_tma and fits_tma(y) and fits_tma(u)
    blast_expand_kernel[(b2 * triton.cdiv(q, config.bn), triton.cdiv(tokens, config.bt))](
        descriptor(y, config.bt, config.bk) if tma else y,
        descriptor(u, config.bn, config.bk) if tma else u,
        s, out, bias, tokens, q, r,
        *y.stride()[:2], *s.stride()[:2], *u.stride()[:2], out.stride(0),
        B1=b1, HAS_BIAS=bias is not None, TMA=tma, PDL=device.has_pdl, PRECISION=dot_precision(y.dtype), LOW=low,
        BT=config.bt, BQ=config.bn, BR=config.bk, num_warps=config.warps, num_stages=config.stages,
        **pdl_option(device),
    )
