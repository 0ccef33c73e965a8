"""The few-token kernels of all three structures: they stream each factor once and do little else.

Two launches per layer. Each loads as many of its weights as registers hold, and asks for the cache lines of the others,
before it waits for the kernel before it, so that the memory never idles between the two.
"""

from __future__ import annotations

from dataclasses import replace

import triton
import triton.language as tl

from hf_blr.ops.triton.activate import activate
from hf_blr.ops.triton.decode_launch import decode_rows, early_steps, expand_config, lines, project_config
from hf_blr.ops.triton.decode_wide import expand_wide
from hf_blr.ops.triton.launch import device_of, dot_precision, pow2, vector_width
from hf_blr.ops.triton.tiles import in_part, prefetch_to_l2, wait_for_previous
from hf_blr.ops.triton.tuned import launch


@triton.jit
def decode_project_kernel(
    x_ptr,
    v_ptr,
    s_ptr,
    z_ptr,
    T,
    P,
    R,
    G_ROWS,
    stride_xt,
    stride_xg,
    stride_xj,
    stride_vg,
    stride_vj,
    stride_vr,
    stride_si,
    stride_sj,
    stride_zi,
    stride_zt,
    K,
    B1: tl.constexpr,
    B2: tl.constexpr,
    LINES: tl.constexpr,
    LINE: tl.constexpr,
    MIX: tl.constexpr,
    ADD: tl.constexpr,
    PDL: tl.constexpr,
    PRECISION: tl.constexpr,
    VEC: tl.constexpr,
    DOT: tl.constexpr,
    DOT_MIX: tl.constexpr,
    UNROLL: tl.constexpr,
    EARLY: tl.constexpr,
    BJ: tl.constexpr,
    BI: tl.constexpr,
    BT: tl.constexpr,
    BR: tl.constexpr,
    BP: tl.constexpr,
):
    """z[i,t,r] = sum_j s[i,j,r] sum_p x[t,j,p] v[j,r,p] (MIX), or the plain sum over j of a product cut into
    B1 parts. With ADD the product is added to what z holds. The first EARLY steps' weights are loaded before the wait.

    The B1 parts are a batch of the product, so that the warps share the work instead of all reading
    everything. Without MIX the grid's second axis g names an input block of Monarch, whose row i*G_ROWS + r
    goes to z[i, t, g*G_ROWS + r]. P, R, G_ROWS, K and the strides come / VEC.
    """
    i_r, i_g = tl.program_id(0), tl.program_id(1)
    o_t, o_j = tl.arange(0, BT), tl.arange(0, BJ)
    o_r = i_r * BR + tl.arange(0, BR)
    m_t, m_r, m_j = o_t < T, o_r < R * VEC, o_j < B1
    v_ptr += i_g.to(tl.int64) * (stride_vg * VEC)
    o_v = o_j.to(tl.int64)[:, None, None] * (stride_vj * VEC) + o_r[None, :, None] * (stride_vr * VEC)
    o_jx = o_j * (stride_xj * VEC)
    b_vs = ()
    for step in tl.static_range(EARLY):
        o_p = step * BP + tl.arange(0, BP)
        m_v = (in_part(o_p, o_jx, P * VEC, K * VEC) & m_j[:, None])[:, None, :] & m_r[None, :, None]
        b_vs = b_vs + (tl.load(v_ptr + o_v + o_p[None, None, :], mask=m_v, other=0.0),)
    if PDL and LINES > 0:
        o_l = EARLY * BP + tl.arange(0, LINES) * LINE
        m_l = m_j[:, None, None] & m_r[None, :, None] & (o_l < P * VEC)[None, None, :]
        prefetch_to_l2(v_ptr, o_v + o_l[None, None, :], m_l)
    wait_for_previous(PDL)
    if MIX:
        o_i = tl.arange(0, BI)
        m_i = o_i < B2
        o_s = o_i[:, None, None] * (stride_si * VEC) + o_j[None, :, None] * (stride_sj * VEC) + o_r[None, None, :]
        m_s = m_i[:, None, None] & m_j[None, :, None] & m_r[None, None, :]
        b_s = tl.load(s_ptr + o_s, mask=m_s, other=0.0)  # [BI, BJ, BR]
    x_ptr += i_g * (stride_xg * VEC)
    o_x = o_t[None, :, None] * (stride_xt * VEC) + o_jx[:, None, None]
    b_xs = ()
    for step in tl.static_range(EARLY):
        o_p = step * BP + tl.arange(0, BP)
        m_x = (in_part(o_p, o_jx, P * VEC, K * VEC) & m_j[:, None])[:, None, :] & m_t[None, :, None]
        b_xs = b_xs + (tl.load(x_ptr + o_x + o_p[None, None, :], mask=m_x, other=0.0),)
    if DOT:
        acc = tl.zeros((BJ, BT, BR), tl.float32)
    else:
        acc = tl.zeros((BJ, BR, BP), tl.float32)
    for step in tl.static_range(EARLY):
        if DOT:
            acc = tl.dot(b_xs[step], tl.permute(b_vs[step], (0, 2, 1)), acc, input_precision=PRECISION)
        else:
            acc += b_xs[step].to(tl.float32) * b_vs[step].to(tl.float32)
    for step in tl.range(EARLY, tl.cdiv(P * VEC, BP), loop_unroll_factor=UNROLL):
        o_p = step * BP + tl.arange(0, BP)
        m_p = in_part(o_p, o_jx, P * VEC, K * VEC) & m_j[:, None]
        b_x = tl.load(x_ptr + o_x + o_p[None, None, :], mask=m_p[:, None, :] & m_t[None, :, None], other=0.0)
        b_v = tl.load(v_ptr + o_v + o_p[None, None, :], mask=m_p[:, None, :] & m_r[None, :, None], other=0.0)
        if DOT:
            acc = tl.dot(b_x, tl.permute(b_v, (0, 2, 1)), acc, input_precision=PRECISION)
        else:
            acc += b_x.to(tl.float32) * b_v.to(tl.float32)
    if DOT:
        b_y = acc
    else:
        b_y = tl.sum(acc, 2)[:, None, :]  # [BJ, 1, BR]
    dtype = z_ptr.dtype.element_ty
    m_tr = m_t[:, None] & m_r[None, :]
    o_z = o_t[:, None] * (stride_zt * VEC)
    if MIX:
        o_zi = o_i[:, None, None] * (stride_zi * VEC) + o_z[None, :, :] + o_r[None, None, :]
        m_z = m_i[:, None, None] & m_tr[None, :, :]
        if DOT_MIX:
            b_z = tl.dot(tl.permute(b_s, (2, 0, 1)), tl.permute(b_y.to(dtype), (2, 0, 1)), input_precision=PRECISION)
            tl.store(z_ptr + o_zi, tl.permute(b_z.to(dtype), (1, 2, 0)), mask=m_z)
        else:
            # the condition keeps Triton 3.6 from making an invalid product of rank 4 of this sum
            b_p = tl.where(m_j[None, :, None, None], b_s.to(tl.float32)[:, :, None, :] * b_y[None, :, :, :], 0.0)
            tl.store(z_ptr + o_zi, tl.sum(b_p, 1).to(dtype), mask=m_z)
    else:
        rows = G_ROWS * VEC
        o_zr = (o_r // rows) * (stride_zi * VEC) + i_g * rows + o_r % rows
        b_z = tl.sum(b_y, 0)
        if ADD:
            b_z += tl.load(z_ptr + o_z + o_zr[None, :], mask=m_tr, other=0.0).to(tl.float32)
        tl.store(z_ptr + o_z + o_zr[None, :], b_z.to(dtype), mask=m_tr)


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
def product_of_rows(
    z_ptr,
    u_ptr,
    o_z,
    o_u,
    m_t,
    m_q,
    b_us,
    R,
    PRECISION: tl.constexpr,
    DOT: tl.constexpr,
    UNROLL: tl.constexpr,
    BT: tl.constexpr,
    BQ: tl.constexpr,
    BR: tl.constexpr,
):
    """`[BT, BQ]`, the sum over R of z u, whose first steps of u are loaded."""
    b_zs = steps_of_rows(z_ptr, o_z, m_t, R, len(b_us), BR)
    if DOT:
        acc = tl.zeros((BT, BQ), tl.float32)
    else:
        acc = tl.zeros((BQ, BR), tl.float32)
    for step in tl.static_range(len(b_us)):
        if DOT:
            acc = tl.dot(b_zs[step], b_us[step].T, acc, input_precision=PRECISION)
        else:
            acc += b_zs[step].to(tl.float32) * b_us[step].to(tl.float32)
    for step in tl.range(len(b_us), tl.cdiv(R, BR), loop_unroll_factor=UNROLL):
        o_r = step * BR + tl.arange(0, BR)
        m_r = o_r < R
        b_z = tl.load(z_ptr + o_z + o_r[None, :], mask=m_t[:, None] & m_r[None, :], other=0.0)
        b_u = tl.load(u_ptr + o_u + o_r[None, :], mask=m_q[:, None] & m_r[None, :], other=0.0)
        if DOT:
            acc = tl.dot(b_z, b_u.T, acc, input_precision=PRECISION)
        else:
            acc += b_z.to(tl.float32) * b_u.to(tl.float32)
    if DOT:
        b_out = acc
    else:
        b_out = tl.sum(acc, 1)[None, :]
    return b_out


@triton.jit
def decode_expand_kernel(
    z_ptr,
    u_ptr,
    bias_ptr,
    out_ptr,
    T,
    Q,
    B2,
    GATED_BLOCKS,
    R,
    stride_zi,
    stride_zt,
    stride_ui,
    stride_uq,
    stride_zg,
    stride_ot,
    HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    LINES: tl.constexpr,
    LINE: tl.constexpr,
    PDL: tl.constexpr,
    PRECISION: tl.constexpr,
    VEC: tl.constexpr,
    DOT: tl.constexpr,
    UNROLL: tl.constexpr,
    EARLY: tl.constexpr,
    BT: tl.constexpr,
    BQ: tl.constexpr,
    BR: tl.constexpr,
):
    """out[t, i*Q + q] = activation(sum_r z[i,t,r] u[i,q,r] + bias[i*Q + q]); R and strides of z and u come / VEC.

    Blocks i from B2 on belong to further layers that share x, whose ranks follow each other in z `[B2, T, S*R]`. The
    first EARLY steps' weights are loaded before the wait. GATED: out is that of block i times the outputs of the second
    layer, whose block is i + GATED_BLOCKS of u and lies stride_zg behind in z.
    """
    i_q, i_i = tl.program_id(0), tl.program_id(1)
    o_t = tl.arange(0, BT)
    o_q = i_q * BQ + tl.arange(0, BQ)
    m_t, m_q = o_t < T, o_q < Q
    u_ptr += i_i.to(tl.int64) * (stride_ui * VEC)
    o_u = o_q[:, None] * (stride_uq * VEC)
    b_us = steps_of_rows(u_ptr, o_u, m_q, R * VEC, EARLY, BR)
    if GATED:
        u2_ptr = u_ptr + tl.cast(GATED_BLOCKS, tl.int64) * (stride_ui * VEC)
        b_u2s = steps_of_rows(u2_ptr, o_u, m_q, R * VEC, EARLY, BR)
    if PDL and LINES > 0:
        o_l = EARLY * BR + tl.arange(0, LINES) * LINE
        m_l = m_q[:, None] & (o_l < R * VEC)[None, :]
        prefetch_to_l2(u_ptr, o_u + o_l[None, :], m_l)
        if GATED:
            prefetch_to_l2(u2_ptr, o_u + o_l[None, :], m_l)
    wait_for_previous(PDL)
    o_z = o_t[:, None] * (stride_zt * VEC)
    z_ptr += (i_i % B2) * (stride_zi * VEC) + (i_i // B2) * (R * VEC)
    b_out = product_of_rows(
        z_ptr, u_ptr, o_z, o_u, m_t, m_q, b_us, R * VEC, PRECISION, DOT, UNROLL, BT, BQ, BR
    )  # fmt: skip
    o_n = i_i * Q + o_q
    if HAS_BIAS:
        b_out += tl.load(bias_ptr + o_n, mask=m_q, other=0.0).to(tl.float32)[None, :]
    if GATED:
        b_gate = b_out
        b_out = product_of_rows(
            z_ptr + stride_zg * VEC, u2_ptr, o_z, o_u, m_t, m_q, b_u2s, R * VEC, PRECISION, DOT, UNROLL, BT, BQ, BR
        )  # fmt: skip
        if HAS_BIAS:
            b_out += tl.load(bias_ptr + GATED_BLOCKS * Q + o_n, mask=m_q, other=0.0).to(tl.float32)[None, :]
        b_out *= activate(b_gate, ACTIVATION)
    else:
        b_out = activate(b_out, ACTIVATION)
    o_o = o_t.to(tl.int64)[:, None] * stride_ot + o_n[None, :]
    tl.store(out_ptr + o_o, b_out.to(out_ptr.dtype.element_ty), mask=m_t[:, None] & m_q[None, :])


def decode_project(x, v, s, z, add=False):
    """Stage one at few tokens: z `[B2, T, R]` of BLAST, or, with s None, of Monarch and low-rank.

    x `[T, K]`, v `[B1, rows, P]`. With `add`, without s only, the product is added to z.
    """
    (b1, rows, p), tokens = v.shape, x.shape[0]
    device, mix = device_of(x), s is not None
    b2 = z.shape[0]
    if mix:
        groups, parts, part, xj, vj, xg, vg, g_rows, k = 1, b1, p, p, v.stride(0), 0, 0, rows, b1 * p
    else:
        # cut in four, so that four warps have a piece each
        parts, part = 4, triton.cdiv(triton.cdiv(p, 4), 16) * 16
        groups, xj, vj, xg, vg, g_rows, k = b1, part, part, p, v.stride(0), rows // b2, p
    si, sj = s.stride()[:2] if mix else (0, 0)
    zi, zt = z.stride()[:2]
    sizes = (part, rows, g_rows, x.stride(0), xg, xj, vg, vj, v.stride(1), si, sj, zi, zt, k)
    vec = vector_width(*sizes)
    line = 128 // x.element_size()
    bt = decode_rows(tokens)
    rule = project_config(parts, b1 * p if mix else p, rows, tokens, mix, x.element_size(), device)

    def run(config):
        early = early_steps(config, part)
        decode_project_kernel[(triton.cdiv(rows, config.rows), groups)](
            x,
            v,
            s,
            z,
            tokens,
            *(n // vec for n in sizes),
            B1=parts,
            B2=b2,
            LINES=lines(part - early * config.length, line),
            LINE=line,
            MIX=mix,
            ADD=add,
            PDL=device.is_hopper,
            PRECISION=dot_precision(x.dtype),
            VEC=vec,
            DOT=bt > 1,
            DOT_MIX=bt > 1 and parts >= 16,
            UNROLL=1 if bt > 1 else config.stages,
            EARLY=early,
            BJ=pow2(parts),
            BI=pow2(b2),
            BT=bt,
            BR=config.rows,
            BP=config.length,
            num_warps=config.warps,
            num_stages=config.stages,
            **({"launch_pdl": True} if device.is_hopper else {}),
        )

    launch(run, "decode_project", rule, bt, (parts, part, rows, groups, b2, mix), x)


def decode_expand(z, u, bias, out, activation="", gated=False):
    """Stage two at few tokens: out `[T, N]` from z `[B2, T, R]` and u `[B2, Q, R]`.

    For S layers that share x: out `[T, S*N]` from z `[B2, T, S*R]` and u `[S*B2, Q, R]`. With `gated`, for one token:
    out `[T, N]` of two layers, activation(the first's) * the second's, from z `[B2, T, 2*R]` or `[2*B2, T, R]`.
    """
    (blocks, q, r), tokens = u.shape, z.shape[1]
    device = device_of(z)
    apart = 0
    if gated:
        blocks //= 2
        apart = r if z.shape[0] == blocks else blocks * z.stride(0)
    sizes = (r, *z.stride()[:2], *u.stride()[:2], apart)
    vec = vector_width(*sizes)
    line = 128 // z.element_size()
    bt = decode_rows(tokens)
    rule = expand_config(r, blocks * q, tokens, z.element_size(), device)
    if gated:
        # each program reads two rows of weights for each of its outputs
        rule = replace(rule, rows=max(1, rule.rows // 2))

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
            blocks,
            *(n // vec for n in sizes),
            out.stride(0),
            HAS_BIAS=bias is not None,
            ACTIVATION=activation,
            GATED=gated,
            LINES=lines(r - early * config.length, line),
            LINE=line,
            PDL=device.is_hopper,
            PRECISION=dot_precision(z.dtype),
            VEC=vec,
            DOT=bt > 1,
            UNROLL=1 if bt > 1 else config.stages,
            EARLY=early,
            BT=bt,
            BQ=config.rows,
            BR=config.length,
            num_warps=config.warps,
            num_stages=config.stages,
            **({"launch_pdl": True} if device.is_hopper else {}),
        )

    launch(run, "decode_expand", rule, bt, (blocks, q, r, gated), z)
