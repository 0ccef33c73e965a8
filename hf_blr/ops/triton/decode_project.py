"""Stage one at few tokens, of all three structures: kernels that stream each factor once and do little else.

Two launches per layer. Each asks for the cache lines of its weights before it waits for the kernel before it, so that
the memory never idles between the two. `decode_expand` has stage two, `decode_one` both for one token.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hf_blr.ops.rules.device import device_of, dot_precision, pow2, vector_width
from hf_blr.ops.rules.few_tokens import decode_rows, lines, project_config
from hf_blr.ops.rules.packed import packed_project_config, within_groups
from hf_blr.ops.triton.bits import numbers_of, weights_of
from hf_blr.ops.triton.decode_one import project_one
from hf_blr.ops.triton.decode_one_mix import project_mixed_one
from hf_blr.ops.triton.decode_places import by_places, project_by_places
from hf_blr.ops.triton.tiles import in_part, mix_of, prefetch_to_l2, wait_for_previous
from hf_blr.ops.triton.tuned import launch


@triton.jit
def decode_project_kernel(
    x_ptr,
    v_ptr,
    vs_ptr,
    s_ptr,
    z_ptr,
    T,
    P,
    R,
    G_ROWS,
    stride_xt,
    stride_xg,
    stride_xj,
    stride_si,
    stride_sj,
    stride_zi,
    stride_zt,
    K,
    stride_vg,
    stride_vj,
    stride_vr,
    stride_cg,
    stride_cj,
    stride_cr,
    B1: tl.constexpr,
    B2: tl.constexpr,
    LINES: tl.constexpr,
    LINE: tl.constexpr,
    MIX: tl.constexpr,
    ADD: tl.constexpr,
    FORM: tl.constexpr,
    PER: tl.constexpr,
    SCALED: tl.constexpr,
    PDL: tl.constexpr,
    PRECISION: tl.constexpr,
    VEC: tl.constexpr,
    VEC_W: tl.constexpr,
    DOT_MIX: tl.constexpr,
    BJ: tl.constexpr,
    BI: tl.constexpr,
    BT: tl.constexpr,
    BR: tl.constexpr,
    BP: tl.constexpr,
):
    """z[i,t,r] = sum_j s[i,j,r] sum_p x[t,j,p] v[j,r,p] (MIX), or the plain sum over j of a product cut into
    B1 parts. With ADD the product is added to what z holds.

    The B1 parts are a batch of the product, so that the warps share the work instead of all reading
    everything. Without MIX the grid's second axis g names an input block of Monarch, whose row i*G_ROWS + r
    goes to z[i, t, g*G_ROWS + r]. P, R, G_ROWS, K and the strides come / VEC, strides of v, in columns of PER numbers,
    / VEC_W. In bits, c holds v's scales, one for each row or for SCALED numbers of it, which steps divide.
    """
    i_r, i_g = tl.program_id(0), tl.program_id(1)
    o_t, o_j = tl.arange(0, BT), tl.arange(0, BJ)
    o_r = i_r * BR + tl.arange(0, BR)
    m_t, m_r, m_j = o_t < T, o_r < R * VEC, o_j < B1
    v_ptr += i_g.to(tl.int64) * (stride_vg * VEC_W)
    o_v = o_j.to(tl.int64)[:, None, None] * (stride_vj * VEC_W) + o_r[None, :, None] * (stride_vr * VEC_W)
    o_jx = o_j * (stride_xj * VEC)
    # in columns
    PC, KC, o_jc = tl.cdiv(P * VEC, PER), tl.cdiv(K * VEC, PER), o_jx // PER
    if PDL:
        o_l = tl.arange(0, LINES) * LINE
        m_l = m_j[:, None, None] & m_r[None, :, None] & (o_l < PC)[None, None, :]
        prefetch_to_l2(v_ptr, o_v + o_l[None, None, :], m_l)
    if FORM != "plain":
        m_jr = m_j[:, None] & m_r[None, :]
        vs_ptr += i_g * stride_cg + o_j[:, None] * stride_cj + o_r[None, :] * stride_cr
        # where in a row a part begins
        o_c0 = o_j * 0 if MIX else o_jx
        o_g = o_c0 // SCALED if SCALED > 0 else o_c0 * 0
        b_c = tl.load(vs_ptr + o_g[:, None], mask=m_jr & (o_c0 < K * VEC)[:, None], other=0.0)
    wait_for_previous(PDL)
    if MIX:
        o_i = tl.arange(0, BI)
        m_i = o_i < B2
        b_s = mix_of(s_ptr, i_r, R * VEC, stride_si * VEC, stride_sj * VEC, B1, B2, BI, BJ, BR)
    x_ptr += i_g * (stride_xg * VEC)
    o_x = o_t[None, :, None] * (stride_xt * VEC) + o_jx[:, None, None]
    acc = tl.zeros((BJ, BT, BR), tl.float32)
    for step in range(0, tl.cdiv(P * VEC, BP)):
        o_p = step * BP + tl.arange(0, BP)
        m_p = in_part(o_p, o_jx, P * VEC, K * VEC) & m_j[:, None]
        b_x = tl.load(x_ptr + o_x + o_p[None, None, :], mask=m_p[:, None, :] & m_t[None, :, None], other=0.0)
        o_c = step * (BP // PER) + tl.arange(0, BP // PER)
        m_c = in_part(o_c, o_jc, PC, KC) & m_j[:, None]
        b_w = tl.load(v_ptr + o_v + o_c[None, None, :], mask=m_c[:, None, :] & m_r[None, :, None], other=0)
        b_v = tl.permute(numbers_of(b_w, FORM, b_x.dtype), (0, 2, 1))
        if SCALED > 0:
            o_next = o_c0 + (step + 1) * BP
            b_next = tl.load(vs_ptr + (o_next // SCALED)[:, None], mask=m_jr & (o_next < K * VEC)[:, None], other=0.0)
            acc += tl.dot(b_x, b_v, input_precision=PRECISION) * b_c.to(tl.float32)[:, None, :]
            b_c = b_next
        else:
            acc = tl.dot(b_x, b_v, acc, input_precision=PRECISION)
    if FORM != "plain" and SCALED == 0:
        acc *= b_c.to(tl.float32)[:, None, :]
    dtype = z_ptr.dtype.element_ty
    m_tr = m_t[:, None] & m_r[None, :]
    o_z = o_t[:, None] * (stride_zt * VEC)
    if MIX:
        o_zi = o_i[:, None, None] * (stride_zi * VEC) + o_z[None, :, :] + o_r[None, None, :]
        m_z = m_i[:, None, None] & m_tr[None, :, :]
        if DOT_MIX:
            b_z = tl.dot(tl.permute(b_s, (2, 0, 1)), tl.permute(acc.to(dtype), (2, 0, 1)), input_precision=PRECISION)
            tl.store(z_ptr + o_zi, tl.permute(b_z.to(dtype), (1, 2, 0)), mask=m_z)
        else:
            # the condition keeps Triton 3.6 from making an invalid product of rank 4 of this sum
            b_p = tl.where(m_j[None, :, None, None], b_s.to(tl.float32)[:, :, None, :] * acc[None, :, :, :], 0.0)
            tl.store(z_ptr + o_zi, tl.sum(b_p, 1).to(dtype), mask=m_z)
    else:
        rows = G_ROWS * VEC
        o_zr = (o_r // rows) * (stride_zi * VEC) + i_g * rows + o_r % rows
        b_z = tl.sum(acc, 0)
        if ADD:
            b_z += tl.load(z_ptr + o_z + o_zr[None, :], mask=m_tr, other=0.0).to(tl.float32)
        tl.store(z_ptr + o_z + o_zr[None, :], b_z.to(dtype), mask=m_tr)


def decode_project(x, v, s, z, add=False):
    """Stage one at few tokens: z `[B2, T, R]` of BLAST, or, with s None, of Monarch and low-rank.

    x `[T, K]`, v `[B1, rows, P]`, plain or in bits. With `add`, without s only, the product is added to z.
    """
    v = weights_of(v)
    (b1, rows, p), tokens = v.shape, x.shape[0]
    device, mix = device_of(x), s is not None
    if tokens == 1 and not add:
        return project_mixed_one(x, v, s, z) if mix else project_one(x, v, z)
    if not mix and by_places(v):
        return project_by_places(x, v, z, add)
    b2 = z.shape[0]
    parts = b1 if mix else 4
    if v.form == "plain":
        rule = project_config(parts, b1 * p if mix else p, rows, tokens, mix, x.element_size(), device)
    else:
        rule = packed_project_config(parts, b1 * p if mix else p, rows, tokens, x.element_size(), device)
    v0, (vg, vr), (cg, cr) = v.data, v.strides, v.scale_strides
    si, sj = s.stride()[:2] if mix else (0, 0)
    zi, zt = z.stride()[:2]
    line = 128 // v0.element_size()
    bt = decode_rows(tokens)

    def run(config):
        config = within_groups(config, v.group)
        if mix:
            part, groups, xj, xg, g_rows, k = p, 1, p, 0, rows, b1 * p
            strides, scale_strides = (0, vg, vr), (0, cg, cr)
        else:
            # cut in four, so that four warps have a piece each; steps in bits begin where words do
            whole = 16 if v.form == "plain" else config.length
            part = triton.cdiv(triton.cdiv(p, 4), whole) * whole
            groups, xj, xg, g_rows, k = b1, part, p, rows // b2, p
            strides, scale_strides = (vg, part // v.per, vr), (cg, 0, cr)
        sizes = (part, rows, g_rows, x.stride(0), xg, xj, si, sj, zi, zt, k)
        vec, vec_w = vector_width(*sizes), vector_width(*strides)
        decode_project_kernel[(triton.cdiv(rows, config.rows), groups)](
            x,
            v0,
            v.scale,
            s,
            z,
            tokens,
            *(n // vec for n in sizes),
            *(n // vec_w for n in strides),
            *scale_strides,
            B1=parts,
            B2=b2,
            LINES=lines(triton.cdiv(part, v.per), line),
            LINE=line,
            MIX=mix,
            ADD=add,
            FORM=v.form,
            PER=v.per,
            SCALED=v.group,
            PDL=device.has_pdl,
            PRECISION=dot_precision(x.dtype),
            VEC=vec,
            VEC_W=vec_w,
            DOT_MIX=parts >= 16,
            BJ=pow2(parts),
            BI=pow2(b2),
            BT=bt,
            BR=config.rows,
            BP=config.length,
            num_warps=config.warps,
            num_stages=config.stages,
            **device.launch_options,
        )

    launch(run, v.named("decode_project"), rule, bt, (parts, p, rows, b1, b2, mix), x)
