"""One token: BLAST's first stage with its mix, in the manner of `decode_one`."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from hf_blr.ops.rules.device import device_of, pow2, vector_width
from hf_blr.ops.rules.few_tokens import one_mix_config
from hf_blr.ops.rules.packed import packed_one_mix_config, word_vector
from hf_blr.ops.triton.bits import Weights, by_place, sum_of_columns, weights_of
from hf_blr.ops.triton.halves import paired
from hf_blr.ops.triton.tiles import mix_of, wait_for_previous
from hf_blr.ops.triton.tuned import launch


@triton.jit
def parts_of(
    v_ptr,
    i_r,
    C,
    R,
    stride_vj,
    stride_vr,
    B1: tl.constexpr,
    STEPS: tl.constexpr,
    BJ: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
):
    """Tile i_r of v `[B1, R, C]` in STEPS pieces `[BJ, BR, BC]`, zero outside; read once, so the first to leave L2."""
    o_j, o_r = tl.arange(0, BJ), i_r * BR + tl.arange(0, BR)
    o = o_j.to(tl.int64)[:, None, None] * stride_vj + o_r[None, :, None] * stride_vr
    pieces = ()
    for step in tl.static_range(STEPS):
        o_c = step * BC + tl.arange(0, BC)
        m = (o_j < B1)[:, None, None] & (o_r < R)[None, :, None] & (o_c < C)[None, None, :]
        pieces = pieces + (tl.load(v_ptr + o + o_c[None, None, :], mask=m, other=0, eviction_policy="evict_first"),)
    return pieces


@triton.jit
def part_scales_of(
    c_ptr,
    i_r,
    C,
    R,
    stride_cj,
    stride_cr,
    B1: tl.constexpr,
    FORM: tl.constexpr,
    PER: tl.constexpr,
    SCALED: tl.constexpr,
    STEPS: tl.constexpr,
    BJ: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
):
    """Of the same tile in bits: the scale of each column in STEPS pieces `[BJ, BR, BC]`, or `[BJ, BR]` of each row."""
    o_j, o_r = tl.arange(0, BJ), i_r * BR + tl.arange(0, BR)
    m = (o_j < B1)[:, None] & (o_r < R)[None, :]
    pieces = ()
    if FORM != "plain":
        c_ptr += o_j[:, None] * stride_cj + o_r[None, :] * stride_cr
        if SCALED == 0:
            pieces = pieces + (tl.load(c_ptr, mask=m, other=0.0),)
        else:
            for step in tl.static_range(STEPS):
                o_c = step * BC + tl.arange(0, BC)
                m_c = m[:, :, None] & (o_c < C)[None, None, :]
                o = (o_c * PER // SCALED)[None, None, :]
                pieces = pieces + (tl.load(c_ptr[:, :, None] + o, mask=m_c, other=0.0),)
    return pieces


@triton.jit(do_not_specialize=["stride_vj", "stride_vr"])
def decode_one_mix_kernel(
    x_ptr,
    v_ptr,
    c_ptr,
    s_ptr,
    z_ptr,
    P,
    R,
    stride_si,
    stride_sj,
    stride_zi,
    stride_vj,
    stride_vr,
    stride_cj,
    stride_cr,
    B1: tl.constexpr,
    B2: tl.constexpr,
    FORM: tl.constexpr,
    PER: tl.constexpr,
    SCALED: tl.constexpr,
    PDL: tl.constexpr,
    VEC: tl.constexpr,
    VEC_W: tl.constexpr,
    STEPS: tl.constexpr,
    BX: tl.constexpr,
    BI: tl.constexpr,
    BJ: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
):
    """z[i, r] = sum_j s[i, j, r] (v[j, r] . x[j]); sizes and strides come / VEC, those of v as in `decode_one_kernel`.

    In bits, c holds v's scales.
    """
    i_p, n_p = tl.program_id(0), tl.num_programs(0)
    o_i, o_j = tl.arange(0, BI), tl.arange(0, BJ)
    stride_vj, stride_vr, C = stride_vj * VEC_W, stride_vr * VEC_W, tl.cdiv(P * VEC, PER)
    b_vs = parts_of(v_ptr, i_p, C, R * VEC, stride_vj, stride_vr, B1, STEPS, BJ, BR, BC)
    b_cs = part_scales_of(c_ptr, i_p, C, R * VEC, stride_cj, stride_cr, B1, FORM, PER, SCALED, STEPS, BJ, BR, BC)
    b_s = mix_of(s_ptr, i_p, R * VEC, stride_si * VEC, stride_sj * VEC, B1, B2, BI, BJ, BR)
    wait_for_previous(PDL)
    b_xs = ()
    for step in tl.static_range(STEPS):
        # equal rows, so that each warp loads what it needs
        o_p = step * BC * PER + tl.arange(0, BC * PER)
        o_x = o_j[:, None, None] * (P * VEC) + o_p[None, None, :]
        m_x = (o_j < B1)[:, None, None] & (o_p < P * VEC)[None, None, :]
        m_x, o_x = tl.broadcast_to(m_x, (BJ, BX, BC * PER)), tl.broadcast_to(o_x, (BJ, BX, BC * PER))
        b_xs = b_xs + by_place(tl.load(x_ptr + o_x, mask=m_x, other=0.0), FORM)
    b_xs = paired(b_xs, 0, STEPS, FORM, PER)
    for i_r in tl.range(i_p, tl.cdiv(R * VEC, BR), n_p):
        i_next = i_r + n_p
        b_next = parts_of(v_ptr, i_next, C, R * VEC, stride_vj, stride_vr, B1, STEPS, BJ, BR, BC)
        b_cs_next = part_scales_of(
            c_ptr, i_next, C, R * VEC, stride_cj, stride_cr, B1, FORM, PER, SCALED, STEPS, BJ, BR, BC
        )
        b_s_next = mix_of(s_ptr, i_next, R * VEC, stride_si * VEC, stride_sj * VEC, B1, B2, BI, BJ, BR)
        b_y = tl.sum(sum_of_columns(b_xs, b_vs, b_cs, 0, STEPS, FORM, PER, SCALED), 2)
        if FORM != "plain" and SCALED == 0:
            b_y *= b_cs[0].to(tl.float32)
        b_z = tl.sum(b_s.to(tl.float32) * b_y[None, :, :], 1)
        o_r = i_r * BR + tl.arange(0, BR)
        m_z = (o_i < B2)[:, None] & (o_r < R * VEC)[None, :]
        tl.store(z_ptr + o_i[:, None] * (stride_zi * VEC) + o_r[None, :], b_z.to(z_ptr.dtype.element_ty), mask=m_z)
        b_vs, b_cs, b_s = b_next, b_cs_next, b_s_next


def project_mixed_one(x: Tensor, v: Tensor | Weights, s: Tensor, z: Tensor):
    """z `[B2, 1, R]` from x `[1, K]`, v `[B1, R, P]`, plain or in bits, and s `[B2, B1, R]`."""
    v, device = weights_of(v), device_of(x)
    b1, r, p = v.shape
    sizes = (p, r, *s.stride()[:2], z.stride(0))
    vec, vec_w = vector_width(*sizes), vector_width(*v.strides)
    if v.form == "plain":
        rule = one_mix_config(b1, p, v.data.element_size(), device)
    else:
        vec_w = min(vec_w, word_vector(v.per))
        rule = packed_one_mix_config(b1, p, r, device)

    def run(config):
        decode_one_mix_kernel[(min(triton.cdiv(r, config.rows), config.programs * device.sms),)](
            x,
            v.data,
            v.scale,
            s,
            z,
            *(n // vec for n in sizes),
            *(n // vec_w for n in v.strides),
            *v.scale_strides,
            B1=b1,
            B2=len(z),
            FORM=v.form_on(device),
            PER=v.per,
            SCALED=v.group,
            PDL=device.has_pdl,
            VEC=vec,
            VEC_W=vec_w,
            STEPS=triton.cdiv(p, config.length),
            BX=config.rows,
            BI=pow2(len(z)),
            BJ=pow2(b1),
            BR=config.rows,
            BC=config.length // v.per,
            num_warps=config.warps,
            **device.launch_options,
        )

    launch(run, v.named("decode_one_mix"), rule, 1, (b1, len(z), p, r), x)
