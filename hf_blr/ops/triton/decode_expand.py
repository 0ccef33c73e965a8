"""Stage two at few tokens: `decode_project` says how both are made; `decode_wide` has that of many outputs.

`decode_one` has that of one token.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hf_blr.ops.rules.device import device_of, dot_precision, vector_width
from hf_blr.ops.rules.few_tokens import decode_rows, early_steps, expand_config, lines
from hf_blr.ops.triton.activate import activate
from hf_blr.ops.triton.decode_one import expand_one
from hf_blr.ops.triton.decode_wide import expand_wide
from hf_blr.ops.triton.tiles import prefetch_to_l2, wait_for_previous
from hf_blr.ops.triton.tuned import launch


@triton.jit
def steps_of_rows(ptr, o_row, m_row, R, STEPS: tl.constexpr, BR: tl.constexpr):
    """The first STEPS tiles `[rows, BR]` of rows of R numbers that begin at ptr + o_row, zero outside."""
    tiles = ()
    for step in tl.static_range(STEPS):
        o_r = step * BR + tl.arange(0, BR)
        m = m_row[:, None] & (o_r < R)[None, :]
        tiles = tiles + (tl.load(ptr + o_row + o_r[None, :], mask=m, other=0.0),)
    return tiles


@triton.jit
def decode_expand_kernel(
    z_ptr,
    u_ptr,
    bias_ptr,
    out_ptr,
    T,
    Q,
    B2,
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
    PDL: tl.constexpr,
    PRECISION: tl.constexpr,
    VEC: tl.constexpr,
    EARLY: tl.constexpr,
    BT: tl.constexpr,
    BQ: tl.constexpr,
    BR: tl.constexpr,
):
    """out[t, i*Q + q] = activation(sum_r z[i,t,r] u[i,q,r] + bias[i*Q + q]); R and strides of z and u come / VEC.

    Blocks i from B2 on belong to further layers that share x, whose ranks follow each other in z `[B2, T, S*R]`. The
    first EARLY steps' weights are loaded before the wait.
    """
    i_q, i_i = tl.program_id(0), tl.program_id(1)
    o_t = tl.arange(0, BT)
    o_q = i_q * BQ + tl.arange(0, BQ)
    m_t, m_q = o_t < T, o_q < Q
    u_ptr += i_i.to(tl.int64) * (stride_ui * VEC)
    o_u = o_q[:, None] * (stride_uq * VEC)
    b_us = steps_of_rows(u_ptr, o_u, m_q, R * VEC, EARLY, BR)
    if PDL and LINES > 0:
        o_l = EARLY * BR + tl.arange(0, LINES) * LINE
        m_l = m_q[:, None] & (o_l < R * VEC)[None, :]
        prefetch_to_l2(u_ptr, o_u + o_l[None, :], m_l)
    wait_for_previous(PDL)
    o_z = o_t[:, None] * (stride_zt * VEC)
    z_ptr += (i_i % B2) * (stride_zi * VEC) + (i_i // B2) * (R * VEC)
    b_zs = steps_of_rows(z_ptr, o_z, m_t, R * VEC, EARLY, BR)
    acc = tl.zeros((BT, BQ), tl.float32)
    for step in tl.static_range(EARLY):
        acc = tl.dot(b_zs[step], b_us[step].T, acc, input_precision=PRECISION)
    for step in range(EARLY, tl.cdiv(R * VEC, BR)):
        o_r = step * BR + tl.arange(0, BR)
        m_r = o_r < R * VEC
        b_z = tl.load(z_ptr + o_z + o_r[None, :], mask=m_t[:, None] & m_r[None, :], other=0.0)
        b_u = tl.load(u_ptr + o_u + o_r[None, :], mask=m_q[:, None] & m_r[None, :], other=0.0)
        acc = tl.dot(b_z, b_u.T, acc, input_precision=PRECISION)
    o_n = i_i * Q + o_q
    if HAS_BIAS:
        acc += tl.load(bias_ptr + o_n, mask=m_q, other=0.0).to(tl.float32)[None, :]
    b_out = activate(acc, ACTIVATION)
    o_o = o_t.to(tl.int64)[:, None] * stride_ot + o_n[None, :]
    tl.store(out_ptr + o_o, b_out.to(out_ptr.dtype.element_ty), mask=m_t[:, None] & m_q[None, :])


def decode_expand(z, u, bias, out, activation=""):
    """Stage two at few tokens: out `[T, N]` from z `[B2, T, R]` and u `[B2, Q, R]`.

    For S layers that share x: out `[T, S*N]` from z `[B2, T, S*R]` and u `[S*B2, Q, R]`.
    """
    (blocks, q, r), tokens = u.shape, z.shape[1]
    if tokens == 1:
        return expand_one(z, u, bias, out, activation)
    device = device_of(z)
    sizes = (r, *z.stride()[:2], *u.stride()[:2])
    vec = vector_width(*sizes)
    line = 128 // z.element_size()
    bt = decode_rows(tokens)
    rule = expand_config(r, blocks * q, tokens, z.element_size(), device)

    def run(config):
        if config.programs:
            return expand_wide(config, z, u, bias, out, activation)
        early = early_steps(config, r)
        decode_expand_kernel[(triton.cdiv(q, config.rows), blocks)](
            z,
            u,
            bias,
            out,
            tokens,
            q,
            z.shape[0],
            *(n // vec for n in sizes),
            out.stride(0),
            HAS_BIAS=bias is not None,
            ACTIVATION=activation,
            LINES=lines(r - early * config.length, line),
            LINE=line,
            PDL=device.has_pdl,
            PRECISION=dot_precision(z.dtype),
            VEC=vec,
            EARLY=early,
            BT=bt,
            BQ=config.rows,
            BR=config.length,
            num_warps=config.warps,
            num_stages=config.stages,
            **device.launch_options,
        )

    launch(run, "decode_expand", rule, bt, (blocks, q, r), z)
