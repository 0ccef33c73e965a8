"""Both stages of a layer, and BLAST's mix between them, in one launch whose programs hand tiles to each other."""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from hf_blr.ops.triton.block_gemm import descriptor, fits_tma
from hf_blr.ops.triton.launch import PersistentConfig, device_of, dot_precision
from hf_blr.ops.triton.tiles import arrive, load_tile, prefetch_to_l2, wait_until


@triton.jit
def two_stage_kernel(
    x,
    v,
    y,
    s_ptr,
    z,
    u,
    u_ptr,
    y_ptr,
    z_ptr,
    out_ptr,
    bias_ptr,
    done_ptr,
    counter_ptr,
    T,
    P,
    RV,
    Q,
    RU,
    stride_xj,
    stride_xt,
    stride_vj,
    stride_vr,
    stride_yj,
    stride_yt,
    stride_si,
    stride_sj,
    stride_zi,
    stride_zt,
    stride_ui,
    stride_uq,
    stride_ot,
    B1: tl.constexpr,
    B2: tl.constexpr,
    MIX: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
    LINES: tl.constexpr,
    LINE: tl.constexpr,
    BT: tl.constexpr,
    BR: tl.constexpr,
    BQ: tl.constexpr,
    BK: tl.constexpr,
    BM: tl.constexpr,
    BS: tl.constexpr,
):
    """y[j] = x[j] v[j]^T; z = mix(y) (BLAST), or y read with swapped blocks (Monarch); out[:, i] = z[i] u[i]^T + bias.

    x `[B1, T, P]`, v `[B1, RV, P]`, u `[B2, Q, RU]`. Every program does its share of stage one, then of the mix, then
    of stage two, in an order in which what a tile waits for is begun before it.
    """
    pid, programs = tl.program_id(0), tl.num_programs(0)
    tiles_t, tiles_r, tiles_q = tl.cdiv(T, BT), tl.cdiv(RV, BR), tl.cdiv(Q, BQ)
    dtype = out_ptr.dtype.element_ty
    mixed_ptr = counter_ptr + tiles_t * tiles_r

    for tile in range(pid, tiles_t * tiles_r * B1, programs):
        i_j, i_tr = tile % B1, tile // B1
        i_t, i_r = i_tr // tiles_r, i_tr % tiles_r
        acc = tl.zeros((BT, BR), tl.float32)
        for step in range(0, tl.cdiv(P, BK)):
            b_x = load_tile(x, i_j, i_t * BT, step * BK, T, P, stride_xj, stride_xt, 1, BT, BK, TMA)
            b_v = load_tile(v, i_j, i_r * BR, step * BK, RV, P, stride_vj, stride_vr, 1, BR, BK, TMA)
            acc = tl.dot(b_x, b_v.T, acc, input_precision=PRECISION)
        o_t = i_t * BT + tl.arange(0, BT)
        o_r = i_r * BR + tl.arange(0, BR)
        o_y = tl.cast(i_j, tl.int64) * stride_yj + o_t.to(tl.int64)[:, None] * stride_yt + o_r[None, :]
        tl.store(y_ptr + o_y, acc.to(dtype), mask=(o_t < T)[:, None] & (o_r < RV)[None, :])
        if MIX:
            arrive(counter_ptr + i_tr, False)
        else:
            arrive(mixed_ptr + i_t, TMA)

    if LINES > 0:
        # stage two's first weights come from memory while the last tiles of stage one finish
        i_n = pid % (B2 * tiles_q)
        o_q = (i_n % tiles_q) * BQ + tl.arange(0, BQ)
        o_l = tl.arange(0, LINES) * LINE
        o_u = tl.cast(i_n // tiles_q, tl.int64) * stride_ui + o_q.to(tl.int64)[:, None] * stride_uq + o_l[None, :]
        prefetch_to_l2(u_ptr, o_u, (o_q < Q)[:, None] & (o_l < RU)[None, :])

    if MIX:
        # the B1 programs that made the parts of a tile share its rows
        for tile in range(pid, tiles_t * tiles_r * B1, programs):
            i_m, i_tr = tile % B1, tile // B1
            i_t, i_r = i_tr // tiles_r, i_tr % tiles_r
            wait_until(counter_ptr + i_tr, B1, False)
            for part in tl.static_range(BM // BS):
                o_t = i_t * BT + i_m * BM + part * BS + tl.arange(0, BS)
                o_r = i_r * BR + tl.arange(0, BR)
                m = ((o_t < T) & (o_t < i_t * BT + BT))[:, None] & (o_r < RV)[None, :]
                o_y = o_t.to(tl.int64)[:, None] * stride_yt + o_r[None, :]
                o_z = o_t.to(tl.int64)[:, None] * stride_zt + o_r[None, :]
                o_s = tl.zeros((BS, 1), tl.int32) + o_r[None, :]
                b_ys = ()
                for j in tl.static_range(B1):
                    b_y = tl.load(y_ptr + tl.cast(j, tl.int64) * stride_yj + o_y, mask=m, other=0.0, cache_modifier=".cg")
                    b_ys = b_ys + (b_y,)
                for i in range(0, B2):
                    b_z = tl.zeros((BS, BR), tl.float32)
                    for j in tl.static_range(B1):
                        b_s = tl.load(s_ptr + i * stride_si + j * stride_sj + o_s, mask=m, other=0.0)
                        b_z += b_s.to(tl.float32) * b_ys[j].to(tl.float32)
                    tl.store(z_ptr + tl.cast(i, tl.int64) * stride_zi + o_z, b_z.to(dtype), mask=m)
            arrive(mixed_ptr + i_t, TMA)

    for tile in range(pid, tiles_t * B2 * tiles_q, programs):
        i_n, i_t = tile % (B2 * tiles_q), tile // (B2 * tiles_q)
        i_i, i_q = i_n // tiles_q, i_n % tiles_q
        wait_until(mixed_ptr + i_t, tiles_r * B1, TMA)
        acc = tl.zeros((BT, BQ), tl.float32)
        if MIX:
            for step in range(0, tl.cdiv(RU, BK)):
                b_z = load_tile(z, i_i, i_t * BT, step * BK, T, RU, stride_zi, stride_zt, 1, BT, BK, TMA)
                b_u = load_tile(u, i_i, i_q * BQ, step * BK, Q, RU, stride_ui, stride_uq, 1, BQ, BK, TMA)
                acc = tl.dot(b_z, b_u.T, acc, input_precision=PRECISION)
        else:
            part = RU // B1
            steps = tl.cdiv(part, BK)
            for step in range(0, B1 * steps):
                i_j = step // steps
                o_k = (step % steps) * BK
                b_z = load_tile(y, i_j, i_t * BT, i_i * part + o_k, T, i_i * part + part, stride_yj, stride_yt, 1,
                                BT, BK, TMA)  # fmt: skip
                b_u = load_tile(u, i_i, i_q * BQ, i_j * part + o_k, Q, i_j * part + part, stride_ui, stride_uq, 1,
                                BQ, BK, TMA)  # fmt: skip
                acc = tl.dot(b_z, b_u.T, acc, input_precision=PRECISION)
        o_t = i_t * BT + tl.arange(0, BT)
        o_q = i_q * BQ + tl.arange(0, BQ)
        if HAS_BIAS:
            acc += tl.load(bias_ptr + i_i * Q + o_q, mask=o_q < Q, other=0.0).to(tl.float32)[None, :]
        o_o = o_t.to(tl.int64)[:, None] * stride_ot + (i_i * Q + o_q)[None, :]
        tl.store(out_ptr + o_o, acc.to(dtype), mask=(o_t < T)[:, None] & (o_q < Q)[None, :])

    # the last program leaves the counters as it found them
    tl.debug_barrier()
    if tl.atomic_add(done_ptr, 1, sem="acq_rel", scope="gpu") == programs - 1:
        for i in range(0, tiles_t * tiles_r + tiles_t):
            tl.store(counter_ptr + i, 0)
        tl.store(done_ptr, 0)


def two_stage(x, v, s, u, bias, out, config: PersistentConfig):
    """out `[T, N]`; s is None for Monarch. x `[T, K]`."""
    (b1, rv, p), (b2, q, ru), tokens = v.shape, u.shape, x.shape[0]
    device, mix = device_of(x), s is not None
    x3 = x.view(tokens, b1, p).transpose(0, 1)
    y = x.new_empty(b1, tokens, rv)
    z = x.new_empty(b2, tokens, rv) if mix else y
    tma = device.has_tma and all(fits_tma(t) for t in (x3, v, y, u)) and (mix or (ru // b1) % config.bk == 0)
    tiles_t, tiles_r, tiles_q = triton.cdiv(tokens, config.bt), triton.cdiv(rv, config.br), triton.cdiv(q, config.bq)
    programs = min(device.sms * config.per_sm, tiles_t * max(tiles_r * b1, tiles_q * b2))
    counters = counters_of(x.device, 1 + tiles_t * tiles_r + tiles_t)
    line = 128 // x.element_size()
    bm = triton.next_power_of_2(triton.cdiv(config.bt, b1))
    two_stage_kernel[(programs,)](
        descriptor(x3, config.bt, config.bk) if tma else x3,
        descriptor(v, config.br, config.bk) if tma else v,
        descriptor(y, config.bt, config.bk) if tma else y,
        s,
        descriptor(z, config.bt, config.bk) if tma else z,
        descriptor(u, config.bq, config.bk) if tma else u,
        u,
        y,
        z,
        out,
        bias,
        counters,
        counters[1:],
        tokens,
        p,
        rv,
        q,
        ru,
        *x3.stride()[:2],
        *v.stride()[:2],
        *y.stride()[:2],
        *(s.stride()[:2] if mix else (0, 0)),
        *z.stride()[:2],
        *u.stride()[:2],
        out.stride(0),
        B1=b1,
        B2=b2,
        MIX=mix,
        HAS_BIAS=bias is not None,
        TMA=tma,
        PRECISION=dot_precision(x.dtype),
        LINES=triton.next_power_of_2(triton.cdiv(ru, line)) if config.prefetch and device.has_pdl else 0,
        LINE=line,
        BT=config.bt,
        BR=config.br,
        BQ=config.bq,
        BK=config.bk,
        BM=bm,
        BS=min(bm, config.bs),
        num_warps=config.warps,
        num_stages=config.stages,
        launch_cooperative_grid=device.sms > 1,
    )


@functools.cache
def counters_of(device: torch.device, size: int) -> torch.Tensor:
    return torch.zeros(size, dtype=torch.int32, device=device)
