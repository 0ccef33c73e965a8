"""Pivoted low-rank: what low-rank runs, behind a gather of the inputs into pivots and the rest."""

from __future__ import annotations

import triton
import triton.language as tl

from hf_blr.ops.rules.device import device_of, pow2, vector_width
from hf_blr.ops.rules.few_tokens import early_steps, lines, pivoted_project_config
from hf_blr.ops.rules.low_rank import kernels_pay
from hf_blr.ops.triton.bits import Weights, by_place, sum_of_columns, weights_of
from hf_blr.ops.triton.columns import gather_columns, scatter_columns
from hf_blr.ops.triton.decode_expand import decode_expand
from hf_blr.ops.triton.decode_project import decode_project
from hf_blr.ops.triton.halves import paired
from hf_blr.ops.triton.low_rank import finish
from hf_blr.ops.triton.tiles import in_part, is_feature, prefetch_to_l2, wait_for_previous
from hf_blr.ops.triton.tuned import launch

#: pieces that a row of c is read in at once, one for each warp
PARTS = 4


@triton.jit
def pivoted_project_kernel(
    x_ptr,
    c_ptr,
    cs_ptr,
    order_ptr,
    y_ptr,
    P,
    R,
    REST,
    stride_cr,
    stride_sr,
    LINES: tl.constexpr,
    ORDER_LINES: tl.constexpr,
    LINE: tl.constexpr,
    ORDER_LINE: tl.constexpr,
    FORM: tl.constexpr,
    PER: tl.constexpr,
    SCALED: tl.constexpr,
    PDL: tl.constexpr,
    VEC: tl.constexpr,
    VEC_W: tl.constexpr,
    UNROLL: tl.constexpr,
    EARLY: tl.constexpr,
    BJ: tl.constexpr,
    BR: tl.constexpr,
    BP: tl.constexpr,
):
    """y[r] = x[order[r]] + sum_k x[order[R+k]] c[r,k] for one token, the sum cut into BJ parts of P.

    `decode_project_kernel` without its mix and groups, but with x gathered as it is loaded; an index that names none
    of the R + REST features reads a zero. Sizes and strides come / VEC, c's, in columns of PER numbers, / VEC_W. The
    first EARLY steps' indices and c are loaded before the wait. In bits, cs holds c's scales.
    """
    i_r = tl.program_id(0)
    BC: tl.constexpr = BP // PER
    o_j, o_b = tl.arange(0, BJ), tl.arange(0, BR)
    o_r = i_r * BR + o_b
    m_r = o_r < R * VEC
    c_ptr += tl.cast(i_r, tl.int64) * BR * (stride_cr * VEC_W)
    if FORM != "plain":
        cs_ptr += o_r * stride_sr
    o_jp, C = o_j * (P * VEC), tl.cdiv(REST * VEC, PER)
    o_jc, PC = o_jp // PER, P * VEC // PER
    o_c = o_jc[:, None, None] + o_b[None, :, None] * (stride_cr * VEC_W)
    # no kernel before writes c or the indices
    b_first = tl.load(order_ptr + o_r, mask=m_r, other=0)
    b_os, b_cs, b_ss = (), (), ()
    for step in tl.static_range(EARLY):
        o_p = step * BP + tl.arange(0, BP)
        m_k = in_part(o_p, o_jp, P * VEC, REST * VEC)
        b_os = b_os + (tl.load(order_ptr + R * VEC + o_jp[:, None] + o_p[None, :], mask=m_k, other=0),)
        b_c, b_s = tile_of_c(c_ptr + o_c, cs_ptr, step, o_jc, m_r, PC, C, FORM, PER, SCALED, BC)
        b_cs, b_ss = b_cs + (b_c,), b_ss + (b_s,)
    if PDL and LINES > 0:
        # the indices too: x cannot be asked for before they are there
        o_i = tl.arange(0, ORDER_LINES) * ORDER_LINE
        prefetch_to_l2(order_ptr, o_i, o_i < (R + REST) * VEC)
        o_l = EARLY * BC + tl.arange(0, LINES) * LINE
        m_l = in_part(o_l, o_jc, PC, C)
        prefetch_to_l2(c_ptr, o_c + o_l[None, None, :], m_l[:, None, :] & m_r[None, :, None])
    b_scale = tl.load(cs_ptr, mask=m_r, other=0.0).to(tl.float32) if FORM != "plain" and SCALED == 0 else 1.0
    wait_for_previous(PDL)
    features = (R + REST) * VEC
    b_pivots = tl.load(x_ptr + b_first, mask=m_r & is_feature(b_first, features), other=0.0)
    b_xs = ()
    for step in tl.static_range(EARLY):
        m_k = in_part(step * BP + tl.arange(0, BP), o_jp, P * VEC, REST * VEC)
        m_x = m_k & is_feature(b_os[step], features)
        b_x = tl.load(x_ptr + b_os[step][:, None, :], mask=m_x[:, None, :], other=0.0)
        b_xs = b_xs + by_place(b_x, FORM)
    acc = tl.zeros((BJ, BR, BC), tl.float32)
    if EARLY > 0:
        acc += sum_of_columns(paired(b_xs, 0, EARLY, FORM, PER), b_cs, b_ss, 0, EARLY, FORM, PER, SCALED)
    for step in tl.range(EARLY, tl.cdiv(P * VEC, BP), loop_unroll_factor=UNROLL):
        o_p = step * BP + tl.arange(0, BP)
        m_k = in_part(o_p, o_jp, P * VEC, REST * VEC)
        b_o = tl.load(order_ptr + R * VEC + o_jp[:, None] + o_p[None, :], mask=m_k, other=0)
        m_x = m_k & is_feature(b_o, features)
        b_x = tl.load(x_ptr + b_o[:, None, :], mask=m_x[:, None, :], other=0.0)
        b_c, b_s = tile_of_c(c_ptr + o_c, cs_ptr, step, o_jc, m_r, PC, C, FORM, PER, SCALED, BC)
        acc += sum_of_columns(paired(by_place(b_x, FORM), 0, 1, FORM, PER), (b_c,), (b_s,), 0, 1, FORM, PER, SCALED)
    b_y = tl.sum(tl.sum(acc, 2), 0) * b_scale + b_pivots.to(tl.float32)
    tl.store(y_ptr + o_r, b_y.to(y_ptr.dtype.element_ty), mask=m_r)


@triton.jit
def tile_of_c(
    c_ptr,
    cs_ptr,
    step,
    o_jc,
    m_r,
    PC,
    C,
    FORM: tl.constexpr,
    PER: tl.constexpr,
    SCALED: tl.constexpr,
    BC: tl.constexpr,
):
    """Columns `[BJ, BR, BC]` of a step, and their scales if SCALED numbers of a row share one."""
    o_c = step * BC + tl.arange(0, BC)
    m = in_part(o_c, o_jc, PC, C)[:, None, :] & m_r[None, :, None]
    b_c = tl.load(c_ptr + o_c[None, None, :], mask=m, other=0)
    b_s = 1.0
    if SCALED > 0:
        o_s = (o_jc[:, None] + o_c[None, :]) * PER // SCALED
        b_s = tl.load(cs_ptr[None, :, None] + o_s[:, None, :], mask=m, other=0.0)
    return b_c, b_s


def forward(x, u, c, order, bias, keep=False, activation=""):
    """x `[T, K]` -> `[T, N]`, and y `[T, R]` if asked to keep it.

    u `[N, R]`, c `[R, K - R]`, order `[K]`, bias `[N]` or None.
    """
    tokens = x.shape[0]
    if not tokens or keep or not kernels_pay(tokens):
        y = project(x, c, order)
        return finish(y, u, bias, activation), y if keep else x.new_empty(0)
    return decode(x, weights_of(u), c, order, bias, activation), x.new_empty(0)


def decode(x, u: Weights, c, order, bias, activation=""):
    """`[T, N]` at few tokens."""
    tokens, (n, r), c = x.shape[0], u.shape, weights_of(c)
    if tokens == 1:
        y = project_one(x, c, order)
    else:
        y, rest = gather_columns(x, order, r)
        if rest.shape[1]:
            decode_project(rest, c.stacked(), None, y[None], add=True)
    out = x.new_empty(tokens, n)
    decode_expand(y[None], u.stacked(), bias, out, activation)
    return out


def backward(grad, x, u, c, order, y, needs):
    """(dx, du, dc); what `needs` does not ask for is empty, as y may be."""
    need_x, need_u, need_c = needs
    r = u.shape[1]
    dx, du, dc = (x.new_empty(0) for _ in range(3))
    if need_u:
        du = grad.T @ (y if y.numel() else project(x, c, order))
    if need_x or need_c:
        dy = grad @ u
        if need_x:
            dx = scatter_columns(dy, dy @ c, order)
        if need_c:
            dc = dy.T @ gather_columns(x, order[r:], 0)[1]
    return dx, du, dc


def project(x, c, order):
    """y `[T, R]`, the first stage of any number of tokens."""
    y, rest = gather_columns(x, order, c.shape[0])
    # in place: the pivots are what the product is added to
    return y.addmm_(rest, c.T)


def project_one(x, c, order):
    """y `[1, R]`, the first stage of one token."""
    r, rest = c.shape
    y, device = x.new_empty(1, r), device_of(x)
    part = triton.cdiv(triton.cdiv(rest, PARTS), 16) * 16
    sizes = (part, r, rest)
    vec, vec_w = vector_width(*sizes), vector_width(*c.strides)
    line, order_line = 128 // c.data.element_size(), 128 // order.element_size()
    rule = pivoted_project_config(PARTS, rest, r, x.element_size(), device)

    def run(config):
        early = early_steps(config, part)
        pivoted_project_kernel[(triton.cdiv(r, config.rows),)](
            x,
            c.data,
            c.scale,
            order,
            y,
            *(n // vec for n in sizes),
            c.strides[0] // vec_w,
            *c.scale_strides,
            LINES=lines(triton.cdiv(part - early * config.length, c.per), line),
            ORDER_LINES=pow2(triton.cdiv(len(order), order_line)),
            LINE=line,
            ORDER_LINE=order_line,
            FORM=c.form_on(device),
            PER=c.per,
            SCALED=c.group,
            PDL=device.has_pdl,
            VEC=vec,
            VEC_W=vec_w,
            UNROLL=config.stages,
            EARLY=early,
            BJ=PARTS,
            BR=config.rows,
            BP=config.length,
            num_warps=config.warps,
            num_stages=config.stages,
            **device.launch_options,
        )

    launch(run, c.named("pivoted_project"), rule, 1, (part, r), x)
    return y
