"""Stage two at few tokens: `decode_project` says how both are made; `decode_wide` has that of many outputs.

`decode_one` has that of one token.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hf_blr.ops.rules.device import device_of, dot_precision, vector_width
from hf_blr.ops.rules.few_tokens import decode_rows, early_steps, expand_config, lines
from hf_blr.ops.rules.packed import packed_expand_config, within_groups
from hf_blr.ops.triton.activate import activate
from hf_blr.ops.triton.bits import numbers_of, step_scale, weights_of
from hf_blr.ops.triton.decode_one import expand_one
from hf_blr.ops.triton.decode_places import by_places, expand_by_places
from hf_blr.ops.triton.decode_wide import expand_wide
from hf_blr.ops.triton.tiles import prefetch_to_l2, wait_for_previous
from hf_blr.ops.triton.tuned import launch


@triton.jit
def steps_of_rows(ptr, o_row, m_row, C, STEPS: tl.constexpr, BC: tl.constexpr):
    """The first STEPS tiles `[rows, BC]` of rows of C columns that begin at ptr + o_row, zero outside."""
    tiles = ()
    for step in tl.static_range(STEPS):
        o_c = step * BC + tl.arange(0, BC)
        m = m_row[:, None] & (o_c < C)[None, :]
        tiles = tiles + (tl.load(ptr + o_row + o_c[None, :], mask=m, other=0),)
    return tiles


@triton.jit
def step_product(
    b_z,
    b_w,
    b_c,
    acc,
    FORM: tl.constexpr,
    SCALED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """acc `[BT, BQ]` plus z `[BT, BR]` times the numbers of b_w `[BQ, columns]`, whose groups' scales are b_c."""
    b_u = numbers_of(b_w, FORM, b_z.dtype).T
    if SCALED > 0:
        acc += tl.dot(b_z, b_u, input_precision=PRECISION) * b_c.to(tl.float32)[None, :]
    else:
        acc = tl.dot(b_z, b_u, acc, input_precision=PRECISION)
    return acc


@triton.jit
def decode_expand_kernel(
    z_ptr,
    u_ptr,
    us_ptr,
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
    stride_ci,
    stride_cq,
    stride_ot,
    HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    LINES: tl.constexpr,
    LINE: tl.constexpr,
    FORM: tl.constexpr,
    PER: tl.constexpr,
    SCALED: tl.constexpr,
    PDL: tl.constexpr,
    PRECISION: tl.constexpr,
    VEC: tl.constexpr,
    VEC_W: tl.constexpr,
    EARLY: tl.constexpr,
    BT: tl.constexpr,
    BQ: tl.constexpr,
    BR: tl.constexpr,
):
    """out[t, i*Q + q] = activation(sum_r z[i,t,r] u[i,q,r] + bias[i*Q + q]); R and strides of z come / VEC, those of u,
    in columns of PER numbers, / VEC_W.

    Blocks i from B2 on belong to further layers that share x, whose ranks follow each other in z `[B2, T, S*R]`. The
    first EARLY steps' weights are loaded before the wait, of plain ones. In bits, c holds u's scales, one for each row
    or for SCALED numbers of it, which steps divide.
    """
    i_q, i_i = tl.program_id(0), tl.program_id(1)
    BC: tl.constexpr = BR // PER
    C = tl.cdiv(R * VEC, PER)
    o_t = tl.arange(0, BT)
    o_q = i_q * BQ + tl.arange(0, BQ)
    m_t, m_q = o_t < T, o_q < Q
    u_ptr += i_i.to(tl.int64) * (stride_ui * VEC_W)
    o_u = o_q[:, None] * (stride_uq * VEC_W)
    b_us = steps_of_rows(u_ptr, o_u, m_q, C, EARLY, BC)
    b_c = 0.0
    if FORM != "plain":
        us_ptr += i_i * stride_ci + o_q * stride_cq
        b_c = step_scale(us_ptr, m_q, 0, R * VEC, SCALED, BR)
    if PDL and LINES > 0:
        o_l = EARLY * BC + tl.arange(0, LINES) * LINE
        m_l = m_q[:, None] & (o_l < C)[None, :]
        prefetch_to_l2(u_ptr, o_u + o_l[None, :], m_l)
    wait_for_previous(PDL)
    o_z = o_t[:, None] * (stride_zt * VEC)
    z_ptr += (i_i % B2) * (stride_zi * VEC) + (i_i // B2) * (R * VEC)
    b_zs = steps_of_rows(z_ptr, o_z, m_t, R * VEC, EARLY, BR)
    acc = tl.zeros((BT, BQ), tl.float32)
    for step in tl.static_range(EARLY):
        acc = step_product(b_zs[step], b_us[step], b_c, acc, FORM, 0, PRECISION)
    for step in range(EARLY, tl.cdiv(R * VEC, BR)):
        o_r, o_c = step * BR + tl.arange(0, BR), step * BC + tl.arange(0, BC)
        b_z = tl.load(z_ptr + o_z + o_r[None, :], mask=m_t[:, None] & (o_r < R * VEC)[None, :], other=0.0)
        b_w = tl.load(u_ptr + o_u + o_c[None, :], mask=m_q[:, None] & (o_c < C)[None, :], other=0)
        if SCALED > 0:
            b_next = step_scale(us_ptr, m_q, step + 1, R * VEC, SCALED, BR)
        acc = step_product(b_z, b_w, b_c, acc, FORM, SCALED, PRECISION)
        if SCALED > 0:
            b_c = b_next
    if FORM != "plain" and SCALED == 0:
        acc *= b_c.to(tl.float32)[None, :]
    o_n = i_i * Q + o_q
    if HAS_BIAS:
        acc += tl.load(bias_ptr + o_n, mask=m_q, other=0.0).to(tl.float32)[None, :]
    b_out = activate(acc, ACTIVATION)
    o_o = o_t.to(tl.int64)[:, None] * stride_ot + o_n[None, :]
    tl.store(out_ptr + o_o, b_out.to(out_ptr.dtype.element_ty), mask=m_t[:, None] & m_q[None, :])


def decode_expand(z, u, bias, out, activation="", beside=False):
    """Stage two at few tokens: out `[T, N]` from z `[B2, T, R]` and u `[B2, Q, R]`, plain or in bits.

    For S layers that share x: out `[T, S*N]` from z `[B2, T, S*R]` and u `[S*B2, Q, R]`. `beside`: the kernel before is
    this function's on other layers of the same z, so that one token's need not wait for it.
    """
    u = weights_of(u)
    (blocks, q, r), tokens = u.shape, z.shape[1]
    if tokens == 1:
        return expand_one(z, u, bias, out, activation, beside=beside)
    if by_places(u):
        return expand_by_places(z, u, bias, out, activation)
    device = device_of(z)
    sizes = (r, *z.stride()[:2])
    vec, vec_w = vector_width(*sizes), vector_width(*u.strides)
    line = 128 // u.data.element_size()
    bt = decode_rows(tokens)
    if u.form == "plain":
        rule = expand_config(r, blocks * q, tokens, z.element_size(), device)
    else:
        rule = packed_expand_config(blocks * q, tokens, z.element_size(), device)

    def run(config):
        if config.programs:
            return expand_wide(config, z, u.data, bias, out, activation)
        config = within_groups(config, u.group)
        early = early_steps(config, r)
        decode_expand_kernel[(triton.cdiv(q, config.rows), blocks)](
            z,
            u.data,
            u.scale,
            bias,
            out,
            tokens,
            q,
            z.shape[0],
            *(n // vec for n in sizes),
            *(n // vec_w for n in u.strides),
            *u.scale_strides,
            out.stride(0),
            HAS_BIAS=bias is not None,
            ACTIVATION=activation,
            LINES=lines(triton.cdiv(r - early * config.length, u.per), line),
            LINE=line,
            FORM=u.form,
            PER=u.per,
            SCALED=u.group,
            PDL=device.has_pdl,
            PRECISION=dot_precision(z.dtype),
            VEC=vec,
            VEC_W=vec_w,
            EARLY=early,
            BT=bt,
            BQ=config.rows,
            BR=config.length,
            num_warps=config.warps,
            num_stages=config.stages,
            **device.launch_options,
        )

    launch(run, u.named("decode_expand"), rule, bt, (blocks, q, r), z)
