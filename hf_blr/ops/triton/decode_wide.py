"""The last stage at 2 to 32 tokens for layers with many outputs: programs that stay, and read z once.

With a program for each tile of rows, z is read as often as there are tiles, and the last ones leave most
multiprocessors idle. Here one or two programs for each multiprocessor hold z in registers as the rows of u pass by.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from hf_blr.ops.rules.device import device_of, dot_precision, pow2, vector_width
from hf_blr.ops.rules.few_tokens import DecodeConfig, decode_rows, lines
from hf_blr.ops.triton.activate import activate
from hf_blr.ops.triton.tiles import in_part, prefetch_to_l2, wait_past_loads


@triton.jit
def load_rows(ptr, o_j, o_n, N, P, R, stride_n, STEPS: tl.constexpr, BP: tl.constexpr):
    """STEPS tiles `[BJ, rows, BP]`: the rows o_n of N, cut into parts of length P that begin at o_j, zero outside."""
    tiles = ()
    for step in tl.static_range(STEPS):
        o_p = step * BP + tl.arange(0, BP)
        o = o_j[:, None, None] + o_n[None, :, None] * stride_n + o_p[None, None, :]
        m = in_part(o_p, o_j, P, R)[:, None, :] & (o_n < N)[None, :, None]
        tiles = tiles + (tl.load(ptr + o, mask=m, other=0.0),)
    return tiles


@triton.jit
def put_tile(
    b_zs,
    b_us,
    bias_ptr,
    out_ptr,
    o_o,
    o_n,
    m_t,
    m_q,
    HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Store the outputs of one tile, the sum over steps and parts of z `[BJ, BT, BP]` and u `[BJ, BQ, BP]`."""
    if HAS_BIAS:
        b_bias = tl.load(bias_ptr + o_n, mask=m_q, other=0.0).to(tl.float32)
    acc = tl.zeros((b_zs[0].shape[0], b_zs[0].shape[1], b_us[0].shape[1]), tl.float32)
    for step in tl.static_range(len(b_zs)):
        acc = tl.dot(b_zs[step], tl.permute(b_us[step], (0, 2, 1)), acc, input_precision=PRECISION)
    b_out = tl.sum(acc, 0)
    if HAS_BIAS:
        b_out += b_bias[None, :]
    b_out = activate(b_out, ACTIVATION)
    tl.store(out_ptr + o_o + o_n[None, :], b_out.to(out_ptr.dtype.element_ty), mask=m_t[:, None] & m_q[None, :])


@triton.jit
def decode_expand_wide_kernel(
    z_ptr,
    u_ptr,
    bias_ptr,
    out_ptr,
    T,
    Q,
    B2,
    PROGRAMS,
    P,
    R,
    stride_zi,
    stride_zt,
    stride_ui,
    stride_uq,
    stride_ot,
    HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    LINES: tl.constexpr,
    LINE: tl.constexpr,
    AHEAD: tl.constexpr,
    PDL: tl.constexpr,
    PRECISION: tl.constexpr,
    VEC: tl.constexpr,
    STEPS: tl.constexpr,
    STAGES: tl.constexpr,
    BJ: tl.constexpr,
    BT: tl.constexpr,
    BQ: tl.constexpr,
    BP: tl.constexpr,
):
    """out[t, i*Q + q] = activation(sum_r z[i,t,r] u[i,q,r] + bias[i*Q + q]); P, R, strides of z and u come / VEC.

    R is cut into BJ parts of P, a batch of the product, so that each warp has a part of z, in registers. Program i_q of
    a block takes its tiles i_q, i_q + PROGRAMS and so on. The wait and the load of z stand inside the loop: what the
    pipeline has in flight, STAGES - 1 tiles, is on its way before, and the lines of AHEAD more are asked for in L2.
    Blocks i from B2 on are as in `decode_expand_kernel`.
    """
    i_q, i_i = tl.program_id(0), tl.program_id(1)
    o_t, o_j, o_b = tl.arange(0, BT), tl.arange(0, BJ), tl.arange(0, BQ)
    m_t = o_t < T
    o_jr = o_j * (P * VEC)
    u_ptr += i_i.to(tl.int64) * (stride_ui * VEC)
    o_o = o_t.to(tl.int64)[:, None] * stride_ot
    o_l = tl.arange(0, LINES) * LINE
    z_ptr += (i_i % B2) * (stride_zi * VEC) + (i_i // B2) * (R * VEC)
    b_zs = ()
    for _step in tl.static_range(STEPS):
        b_zs = b_zs + (tl.zeros((BJ, BT, BP), z_ptr.dtype.element_ty),)
    for tile in tl.range(i_q, tl.cdiv(Q, BQ), PROGRAMS):
        o_q = tile * BQ + o_b
        b_us = load_rows(u_ptr, o_jr, o_q, Q, P * VEC, R * VEC, stride_uq * VEC, STEPS, BP)
        if tile == i_q:
            if PDL:
                for ahead in tl.static_range(STAGES - 1, STAGES - 1 + AHEAD):
                    o_n = o_q + ahead * PROGRAMS * BQ
                    m_l = in_part(o_l, o_jr, P * VEC, R * VEC)[:, None, :] & (o_n < Q)[None, :, None]
                    o_u = o_jr[:, None, None] + o_n[None, :, None] * (stride_uq * VEC) + o_l[None, None, :]
                    prefetch_to_l2(u_ptr, o_u, m_l)
            wait_past_loads(PDL)
            b_zs = load_rows(z_ptr, o_jr, o_t, T, P * VEC, R * VEC, stride_zt * VEC, STEPS, BP)
        put_tile(b_zs, b_us, bias_ptr, out_ptr, o_o, i_i * Q + o_q, m_t, o_q < Q, HAS_BIAS, ACTIVATION, PRECISION)


def expand_wide(config: DecodeConfig, z: Tensor, u: Tensor, bias: Tensor | None, out: Tensor, activation: str = ""):
    """`decode_expand` from 2 tokens on, with a setting whose `programs` are not 0."""
    (blocks, q, r), tokens = u.shape, z.shape[1]
    device = device_of(z)
    parts = config.warps
    part = triton.cdiv(triton.cdiv(r, parts), 16) * 16
    length = min(config.length, pow2(part))
    programs = min(triton.cdiv(q, config.rows), max(1, config.programs * device.sms // blocks))
    sizes = (part, r, *z.stride()[:2], *u.stride()[:2])
    vec = vector_width(*sizes)
    line = 128 // z.element_size()
    decode_expand_wide_kernel[(programs, blocks)](
        z,
        u,
        bias,
        out,
        tokens,
        q,
        z.shape[0],
        programs,
        *(n // vec for n in sizes),
        out.stride(0),
        HAS_BIAS=bias is not None,
        ACTIVATION=activation,
        LINES=lines(part, line),
        LINE=line,
        AHEAD=config.ahead,
        PDL=device.has_pdl,
        PRECISION=dot_precision(z.dtype),
        VEC=vec,
        STEPS=triton.cdiv(part, length),
        STAGES=config.stages,
        BJ=parts,
        BT=decode_rows(tokens),
        BQ=config.rows,
        BP=length,
        num_warps=config.warps,
        num_stages=config.stages,
        **device.launch_options,
    )
