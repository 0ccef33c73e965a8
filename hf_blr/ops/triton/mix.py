"""BLAST's mix between its two stacks of products, and its gradients."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from hf_blr.ops.rules.device import device_of, dot_precision, pow2, vector_width
from hf_blr.ops.rules.mix import ds_config, ds_group, mix_config
from hf_blr.ops.triton.tuned import launch


@triton.jit
def blast_mix_kernel(
    y_ptr,
    s_ptr,
    z_ptr,
    T,
    R,
    stride_yg,
    stride_yj,
    stride_yt,
    stride_si,
    stride_sj,
    stride_zi,
    stride_zt,
    B1: tl.constexpr,
    B2: tl.constexpr,
    DOT: tl.constexpr,
    ALONG_T: tl.constexpr,
    PRECISION: tl.constexpr,
    VEC: tl.constexpr,
    BJ: tl.constexpr,
    BI: tl.constexpr,
    BT: tl.constexpr,
    BR: tl.constexpr,
):
    """z[i,t,r] = sum_j s[i,j,r] y[j,t,r], y `[B1, T, R]`, z `[B2, T, R]`; sizes and strides come / VEC.

    DOT does it as one small product per r on the tensor cores. r is contiguous in y and z, or, ALONG_T, t is:
    then stride_yt and stride_zt are the strides of r, and no tile changes its order on the way to the tensor
    cores. The grid's third axis names a layer of several that share x: y and s hold R ranks of each, z B2 blocks.
    """
    i_r, i_t, i_g = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    y_ptr += i_g * (stride_yg * VEC)
    s_ptr += i_g * (R * VEC)
    z_ptr += i_g * (B2 * stride_zi * VEC)
    o_r = i_r * BR + tl.arange(0, BR)
    o_t = i_t * BT + tl.arange(0, BT)
    m_r, m_t = o_r < R * VEC, o_t < T
    m_tr = m_t[:, None] & m_r[None, :]
    if DOT:
        o_j, o_i = tl.arange(0, BJ), tl.arange(0, BI)
        m_j, m_i = o_j < B1, o_i < B2
        o_ij = o_i[:, None] * (stride_si * VEC) + o_j[None, :] * (stride_sj * VEC)
        m_s = m_r[:, None, None] & (m_i[:, None] & m_j[None, :])[None, :, :]
        b_s = tl.load(s_ptr + o_r[:, None, None] + o_ij[None, :, :], mask=m_s, other=0.0)  # [BR, BI, BJ]
        if ALONG_T:
            o_ry = o_r.to(tl.int64)[:, None, None] * (stride_yt * VEC) + o_t[None, None, :]
            o_rz = o_r.to(tl.int64)[:, None, None] * (stride_zt * VEC) + o_t[None, None, :]
            m_rt = m_r[:, None, None] & m_t[None, None, :]
            b_y = tl.load(
                y_ptr + o_j[None, :, None] * (stride_yj * VEC) + o_ry,
                mask=m_j[None, :, None] & m_rt,
                other=0.0,
            )
            b_z = tl.dot(b_s, b_y, input_precision=PRECISION)  # [BR, BI, BT]
            o_z = o_i.to(tl.int64)[None, :, None] * (stride_zi * VEC) + o_rz
            tl.store(z_ptr + o_z, b_z.to(z_ptr.dtype.element_ty), mask=m_i[None, :, None] & m_rt)
        else:
            # loaded with r last and turned here: loaded in this order, 4x32 blocks cost a fifth of a training
            # step more
            o_ty = o_t.to(tl.int64)[None, :, None] * (stride_yt * VEC) + o_r[None, None, :]
            o_tz = o_t.to(tl.int64)[None, :, None] * (stride_zt * VEC) + o_r[None, None, :]
            o_y = o_j.to(tl.int64)[:, None, None] * (stride_yj * VEC) + o_ty
            b_y = tl.load(y_ptr + o_y, mask=m_j[:, None, None] & m_tr[None, :, :], other=0.0)  # [BJ, BT, BR]
            b_z = tl.dot(b_s, tl.permute(b_y, (2, 0, 1)), input_precision=PRECISION).to(z_ptr.dtype.element_ty)
            o_z = o_i.to(tl.int64)[:, None, None] * (stride_zi * VEC) + o_tz
            tl.store(z_ptr + o_z, tl.permute(b_z, (1, 2, 0)), mask=m_i[:, None, None] & m_tr[None, :, :])
    else:
        o_y = o_t.to(tl.int64)[:, None] * (stride_yt * VEC) + o_r[None, :]
        o_z = o_t.to(tl.int64)[:, None] * (stride_zt * VEC) + o_r[None, :]
        # s is loaded once per row of the tile, in y's own layout: any narrower tile goes through shared
        # memory
        o_s = tl.zeros((BT, 1), tl.int32) + o_r[None, :]
        b_ys = ()
        for j in tl.static_range(B1):
            b_ys = b_ys + (tl.load(y_ptr + tl.cast(stride_yj, tl.int64) * (j * VEC) + o_y, mask=m_tr, other=0.0),)
        for i in tl.static_range(B2):
            b_z = tl.zeros((BT, BR), tl.float32)
            for j in tl.static_range(B1):
                b_s = tl.load(s_ptr + (i * stride_si + j * stride_sj) * VEC + o_s, mask=m_tr, other=0.0)
                b_z += b_s.to(tl.float32) * b_ys[j].to(tl.float32)
            tl.store(
                z_ptr + tl.cast(stride_zi, tl.int64) * (i * VEC) + o_z,
                b_z.to(z_ptr.dtype.element_ty),
                mask=m_tr,
            )


@triton.jit
def blast_ds_kernel(
    dz_ptr,
    y_ptr,
    s_ptr,
    ds_ptr,
    dy_ptr,
    z_ptr,
    T,
    R,
    stride_zi,
    stride_zt,
    stride_yj,
    stride_yt,
    stride_si,
    stride_sj,
    B1: tl.constexpr,
    B2: tl.constexpr,
    DOT: tl.constexpr,
    ALL: tl.constexpr,
    PRECISION: tl.constexpr,
    VEC: tl.constexpr,
    BJ: tl.constexpr,
    BI: tl.constexpr,
    BT: tl.constexpr,
    BR: tl.constexpr,
    STEPS: tl.constexpr,
):
    """ds[c,i,j,r] = sum over the STEPS * BT tokens of chunk c of dz[i,t,r] y[j,t,r].

    DOT takes all pairs of blocks at once, one small product per r; else the third axis of the grid cuts i in
    groups of BI. ALL (one group) also writes z[i,t,r] = sum_j s[i,j,r] y[j,t,r] and dy[j,t,r] = sum_i
    s[i,j,r] dz[i,t,r], laid out as dz and y: all that the backward wants of the mix, for one reading of y and
    dz.
    """
    i_r, i_c, i_g = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    o_r = i_r * BR + tl.arange(0, BR)
    m_r = o_r < R * VEC
    if DOT:
        o_i, o_j = tl.arange(0, BI), tl.arange(0, BJ)
        m_i, m_j = o_i < B2, o_j < B1
        o_z = o_i.to(tl.int64)[:, None, None] * (stride_zi * VEC) + o_r[None, None, :]
        o_y = o_j.to(tl.int64)[:, None, None] * (stride_yj * VEC) + o_r[None, None, :]
        acc = tl.zeros((BR, BI, BJ), tl.float32)
        for step in range(0, STEPS):
            o_t = (i_c * STEPS + step) * BT + tl.arange(0, BT)
            m_tr = (o_t < T)[:, None] & m_r[None, :]
            o_zt = o_t.to(tl.int64)[None, :, None] * (stride_zt * VEC)
            o_yt = o_t.to(tl.int64)[None, :, None] * (stride_yt * VEC)
            b_dz = tl.load(dz_ptr + o_z + o_zt, mask=m_i[:, None, None] & m_tr[None, :, :], other=0.0)
            b_y = tl.load(y_ptr + o_y + o_yt, mask=m_j[:, None, None] & m_tr[None, :, :], other=0.0)
            acc = tl.dot(tl.permute(b_dz, (2, 0, 1)), tl.permute(b_y, (2, 1, 0)), acc, input_precision=PRECISION)
        o = ((i_c * B2 + o_i[None, :, None]) * B1 + o_j[None, None, :]) * (R * VEC) + o_r[:, None, None]
        tl.store(ds_ptr + o, acc, mask=m_r[:, None, None] & m_i[None, :, None] & m_j[None, None, :])
    else:
        accs = ()
        for _ in tl.static_range(BI * B1):
            accs = accs + (tl.zeros((BT, BR), tl.float32),)
        for step in range(0, STEPS):
            o_t = (i_c * STEPS + step) * BT + tl.arange(0, BT)
            m_tr = (o_t < T)[:, None] & m_r[None, :]
            o_z = o_t.to(tl.int64)[:, None] * (stride_zt * VEC) + o_r[None, :]
            o_y = o_t.to(tl.int64)[:, None] * (stride_yt * VEC) + o_r[None, :]
            b_ys = ()
            for j in tl.static_range(B1):
                o_yj = tl.cast(stride_yj, tl.int64) * (j * VEC) + o_y
                b_ys = b_ys + (tl.load(y_ptr + o_yj, mask=m_tr, other=0.0).to(tl.float32),)
            sums, b_dys = (), ()
            if ALL:
                o_s = tl.zeros((BT, 1), tl.int32) + o_r[None, :]
                for _ in tl.static_range(B1):
                    b_dys = b_dys + (tl.zeros((BT, BR), tl.float32),)
            for i in tl.static_range(BI):
                o_zi = tl.cast(stride_zi, tl.int64) * ((i_g * BI + i) * VEC) + o_z
                b_dz = tl.load(dz_ptr + o_zi, mask=m_tr, other=0.0).to(tl.float32)
                for j in tl.static_range(B1):
                    sums = sums + (accs[i * B1 + j] + b_dz * b_ys[j],)
                if ALL:
                    b_z = tl.zeros((BT, BR), tl.float32)
                    b_next = ()
                    for j in tl.static_range(B1):
                        o_sij = (i * stride_si + j * stride_sj) * VEC + o_s
                        b_s = tl.load(s_ptr + o_sij, mask=m_tr, other=0.0).to(tl.float32)
                        b_z += b_s * b_ys[j]
                        b_next = b_next + (b_dys[j] + b_s * b_dz,)
                    b_dys = b_next
                    tl.store(z_ptr + o_zi, b_z.to(z_ptr.dtype.element_ty), mask=m_tr)
            if ALL:
                for j in tl.static_range(B1):
                    o_yj = tl.cast(stride_yj, tl.int64) * (j * VEC) + o_y
                    tl.store(dy_ptr + o_yj, b_dys[j].to(dy_ptr.dtype.element_ty), mask=m_tr)
            accs = sums
        for i in tl.static_range(BI):
            i_i = i_g * BI + i
            for j in tl.static_range(B1):
                o = ((i_c * B2 + i_i) * B1 + j) * (R * VEC) + o_r
                tl.store(ds_ptr + o, tl.sum(accs[i * B1 + j], 0), mask=m_r)


def stack_along_t(blocks, tokens, width, like):
    """An empty `[blocks, T, width]` in which t is contiguous; memory is padded to whole vectors of tokens."""
    padded = triton.cdiv(tokens, 16) * 16
    return like.new_empty(width, blocks, padded)[:, :, :tokens].permute(1, 2, 0)


def blast_mix(y, s, layers=1):
    """z `[B2, T, R]` from y `[B1, T, R]` and s `[B2, B1, R]`, laid out as y and in its dtype; with s^T, dy from dz.

    For S layers that share x: z `[S*B2, T, R]` from y
    `[B1, T, S*R]` and s `[B2, B1, S*R]`.
    """
    (b2, b1, width), tokens = s.shape, y.shape[1]
    blocks, r, along_t = layers * b2, width // layers, y.stride(2) > 1
    z = stack_along_t(blocks, tokens, r, y) if along_t else y.new_empty(blocks, tokens, r)
    rule = mix_config(b1, b2, tokens, along_t, device_of(y))
    outer = 2 if along_t else 1
    strides = (r * y.stride(2), y.stride(0), y.stride(outer), *s.stride()[:2], z.stride(0), z.stride(outer))
    vec = vector_width(r, *strides)

    def run(config):
        grid = (triton.cdiv(r, config.br), triton.cdiv(tokens, config.bt), layers)
        blast_mix_kernel[grid](
            y,
            s,
            z,
            # along t the padding is mixed too: it reaches nothing but padding
            triton.cdiv(tokens, 16) * 16 if along_t else tokens,
            r // vec,
            *(n // vec for n in strides),
            B1=b1,
            B2=b2,
            DOT=config.dot,
            ALONG_T=along_t,
            PRECISION=dot_precision(y.dtype),
            VEC=vec,
            BJ=max(16, pow2(b1)),
            BI=max(16, pow2(b2)),
            BT=config.bt,
            BR=config.br,
            num_warps=config.warps,
        )

    launch(run, "blast_mix", rule, tokens, (b1, b2, r, layers, along_t), y)
    return z


def blast_mix_bwd(dz, y, s):
    """(z, dy, ds) from dz `[B2, T, R]`, y `[B1, T, R]` and s `[B2, B1, R]`; sums in fixed order."""
    (b2, tokens, r), b1 = dz.shape, y.shape[0]
    config = ds_config(b1, b2, device_of(y))
    group = max(16, pow2(b2)) if config.dot else ds_group(b1, b2)
    fused = group == b2 and not config.dot
    z, dy = (
        (torch.empty_like(dz), torch.empty_like(y)) if fused else (blast_mix(y, s), blast_mix(dz, s.transpose(0, 1)))
    )
    steps = triton.cdiv(256 if config.dot else 64, config.bt)
    chunks = triton.cdiv(tokens, steps * config.bt)
    ds = torch.empty(chunks, b2, b1, r, dtype=torch.float32, device=y.device)
    strides = (*dz.stride()[:2], *y.stride()[:2], *s.stride()[:2])
    vec = vector_width(r, *strides)
    blast_ds_kernel[(triton.cdiv(r, config.br), chunks, triton.cdiv(b2, group))](
        dz,
        y,
        s,
        ds,
        dy,
        z,
        tokens,
        r // vec,
        *(n // vec for n in strides),
        B1=b1,
        B2=b2,
        DOT=config.dot,
        ALL=fused,
        PRECISION=dot_precision(y.dtype),
        VEC=vec,
        BJ=max(16, pow2(b1)),
        BI=group,
        BT=config.bt,
        BR=config.br,
        STEPS=steps,
        num_warps=config.warps,
    )
    return z, dy, ds.sum(0).to(y.dtype)
