"""One token: BLAST's first stage with its mix, in the manner of `decode_one`."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from hf_blr.ops.rules.device import device_of, pow2, vector_width
from hf_blr.ops.rules.few_tokens import one_mix_config
from hf_blr.ops.triton.tiles import mix_of, sum_of_products, wait_for_previous
from hf_blr.ops.triton.tuned import launch


@triton.jit
def parts_of(
    v_ptr,
    i_r,
    P,
    R,
    stride_vj,
    stride_vr,
    B1: tl.constexpr,
    STEPS: tl.constexpr,
    BJ: tl.constexpr,
    BR: tl.constexpr,
    BP: tl.constexpr,
):
    """Tile i_r of v `[B1, R, P]` in STEPS pieces `[BJ, BR, BP]`, zero outside; read once, so the first to leave L2."""
    o_j, o_r = tl.arange(0, BJ), i_r * BR + tl.arange(0, BR)
    o = o_j.to(tl.int64)[:, None, None] * stride_vj + o_r[None, :, None] * stride_vr
    pieces = ()
    for step in tl.static_range(STEPS):
        o_p = step * BP + tl.arange(0, BP)
        m = (o_j < B1)[:, None, None] & (o_r < R)[None, :, None] & (o_p < P)[None, None, :]
        pieces = pieces + (tl.load(v_ptr + o + o_p[None, None, :], mask=m, other=0.0, eviction_policy="evict_first"),)
    return pieces


@triton.jit
def decode_one_mix_kernel(
    x_ptr,
    v_ptr,
    s_ptr,
    z_ptr,
    P,
    R,
    stride_vj,
    stride_vr,
    stride_si,
    stride_sj,
    stride_zi,
    B1: tl.constexpr,
    B2: tl.constexpr,
    PDL: tl.constexpr,
    VEC: tl.constexpr,
    STEPS: tl.constexpr,
    BI: tl.constexpr,
    BJ: tl.constexpr,
    BR: tl.constexpr,
    BP: tl.constexpr,
):
    """z[i, r] = sum_j s[i, j, r] (v[j, r] . x[j]); sizes and strides come / VEC."""
    i_p, n_p = tl.program_id(0), tl.num_programs(0)
    o_i, o_j = tl.arange(0, BI), tl.arange(0, BJ)
    b_vs = parts_of(v_ptr, i_p, P * VEC, R * VEC, stride_vj * VEC, stride_vr * VEC, B1, STEPS, BJ, BR, BP)
    b_s = mix_of(s_ptr, i_p, R * VEC, stride_si * VEC, stride_sj * VEC, B1, B2, BI, BJ, BR)
    wait_for_previous(PDL)
    b_xs = ()
    for step in tl.static_range(STEPS):
        # equal rows, so that each warp loads what it needs
        o_p = step * BP + tl.arange(0, BP)
        o_x = o_j[:, None, None] * (P * VEC) + o_p[None, None, :]
        m_x = (o_j < B1)[:, None, None] & (o_p < P * VEC)[None, None, :]
        m_x, o_x = tl.broadcast_to(m_x, (BJ, BR, BP)), tl.broadcast_to(o_x, (BJ, BR, BP))
        b_xs = b_xs + (tl.load(x_ptr + o_x, mask=m_x, other=0.0),)
    for i_r in tl.range(i_p, tl.cdiv(R * VEC, BR), n_p):
        i_next = i_r + n_p
        b_next = parts_of(v_ptr, i_next, P * VEC, R * VEC, stride_vj * VEC, stride_vr * VEC, B1, STEPS, BJ, BR, BP)
        b_s_next = mix_of(s_ptr, i_next, R * VEC, stride_si * VEC, stride_sj * VEC, B1, B2, BI, BJ, BR)
        b_y = tl.sum(sum_of_products(b_xs, b_vs), 2)
        b_z = tl.sum(b_s.to(tl.float32) * b_y[None, :, :], 1)
        o_r = i_r * BR + tl.arange(0, BR)
        m_z = (o_i < B2)[:, None] & (o_r < R * VEC)[None, :]
        tl.store(z_ptr + o_i[:, None] * (stride_zi * VEC) + o_r[None, :], b_z.to(z_ptr.dtype.element_ty), mask=m_z)
        b_vs, b_s = b_next, b_s_next


def project_mixed_one(x: Tensor, v: Tensor, s: Tensor, z: Tensor):
    """z `[B2, 1, R]` from x `[1, K]`, v `[B1, R, P]` and s `[B2, B1, R]`."""
    (b1, r, p), device = v.shape, device_of(x)
    sizes = (p, r, *v.stride()[:2], *s.stride()[:2], z.stride(0))
    vec = vector_width(*sizes)
    rule = one_mix_config(b1, p, v.element_size(), device)

    def run(config):
        decode_one_mix_kernel[(min(triton.cdiv(r, config.rows), config.programs * device.sms),)](
            x,
            v,
            s,
            z,
            *(n // vec for n in sizes),
            B1=b1,
            B2=len(z),
            PDL=device.has_pdl,
            VEC=vec,
            STEPS=triton.cdiv(p, config.length),
            BI=pow2(len(z)),
            BJ=pow2(b1),
            BR=config.rows,
            BP=config.length,
            num_warps=config.warps,
            **device.launch_options,
        )

    launch(run, "decode_one_mix", rule, 1, (b1, len(z), p, r), v)
