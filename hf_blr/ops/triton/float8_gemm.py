"""A stack of products of float8, whose results are scaled, and cast again, while they are stored.

The first stage of a layer stores float8. By Cauchy-Schwarz no result exceeds the norm of a token times that of a row of
weights, which is bounded by its scale: no pass over the results is needed to find how large they are.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from hf_blr.ops.cast import LARGEST
from hf_blr.ops.rules.device import device_of, pow2
from hf_blr.ops.rules.float8 import float8_config
from hf_blr.ops.triton.activate import activate
from hf_blr.ops.triton.block_gemm import descriptor, fits_tma
from hf_blr.ops.triton.tiles import load_tile
from hf_blr.ops.triton.tuned import launch

#: as much longer can rounding to e4m3 make a vector
LONGER = 1 + 2**-4
#: numbers of float8 in a line of the caches
LINE = 128


@triton.jit
def peaks_of(peaks_ptr, i_i, J, B2, R, BS: tl.constexpr):
    """`[BS]`, whose largest is that of peaks[:, i_i] of peaks `[J, B2, R]`; found late, its loads wait for nothing."""
    o = tl.arange(0, BS)
    b_peaks = tl.load(peaks_ptr + (o // R) * B2 * R + i_i * R + o % R, mask=o < J * R, other=0.0).to(tl.float32)
    for step in range(1, tl.cdiv(J * R, BS)):
        o = step * BS + tl.arange(0, BS)
        o_p = (o // R) * B2 * R + i_i * R + o % R
        b_peaks = tl.maximum(b_peaks, tl.load(peaks_ptr + o_p, mask=o < J * R, other=0.0).to(tl.float32))
    return b_peaks


@triton.jit
def finish(
    acc,
    c_ptr,
    b_scale_ptr,
    x_scale_ptr,
    pivots_ptr,
    bias_ptr,
    i_g,
    o_t,
    o_n,
    T,
    N,
    stride_ct,
    stride_cn,
    stride_pt,
    peak,
    FIRST: tl.constexpr,
    SCALED: tl.constexpr,
    PIVOTS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    """Scale the sums `[BT, BN]` of tokens o_t and outputs o_n and store them in c `[T, N]`, see the kernel."""
    m_t, m_n = o_t < T, o_n < N
    if SCALED:
        acc *= tl.load(b_scale_ptr + i_g * N + o_n, mask=m_n, other=0.0).to(tl.float32)[None, :]
    if PIVOTS:
        o_p = o_t.to(tl.int64)[:, None] * stride_pt + o_n[None, :]
        acc += tl.load(pivots_ptr + o_p, mask=m_t[:, None] & m_n[None, :], other=0.0).to(tl.float32)
    if FIRST:
        acc *= 1 / peak
    else:
        acc *= (tl.load(x_scale_ptr + o_t, mask=m_t, other=0.0) * peak)[:, None]
    if HAS_BIAS:
        acc += tl.load(bias_ptr + i_g * N + o_n, mask=m_n, other=0.0).to(tl.float32)[None, :]
    acc = activate(acc, ACTIVATION)
    o = o_t.to(tl.int64)[:, None] * stride_ct + o_n.to(tl.int64)[None, :] * stride_cn
    tl.store(c_ptr + o, acc.to(c_ptr.dtype.element_ty), mask=m_t[:, None] & m_n[None, :])


@triton.jit
def float8_gemm_kernel(
    a,
    b,
    b_beside,
    c_ptr,
    b_scale_ptr,
    x_scale_ptr,
    peaks_ptr,
    pivots_ptr,
    bias_ptr,
    last_scale_ptr,
    row_scale_ptr,
    column_scale_ptr,
    T,
    N,
    K,
    GROUPS,
    LAST,
    B2,
    PEAKS_J,
    PEAKS_R,
    REPEAT,
    stride_ag,
    stride_at,
    stride_bg,
    stride_bn,
    stride_cj,
    stride_ci,
    stride_ct,
    stride_cn,
    stride_pt,
    bound,
    extra,
    FIRST: tl.constexpr,
    SCALED: tl.constexpr,
    PEAKS: tl.constexpr,
    PIVOTS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    EMITS: tl.constexpr,
    TMA: tl.constexpr,
    STAYS: tl.constexpr,
    BS: tl.constexpr,
    BT: tl.constexpr,
    BN: tl.constexpr,
    BESIDE: tl.constexpr,
    BK: tl.constexpr,
):
    """c[g] = a[g // REPEAT] b[g]^T for a `[G/REPEAT, T, K]`, b `[G, N, K]`, with scales; group g is pair (j, i) of B2.

    SCALED: columns are multiplied by b's scale `[G, N]`. PIVOTS adds those `[T, N]` to the results. No result of the
    first stage exceeds `peak` times the norm of a token; FIRST divides by it, so that results fit c's float8, and the
    last stage multiplies by it and by x_scale `[T]`. peaks `[J, B2, R]`: see `Peak`. EMITS: see `EmittedScales`.
    A tile is BN + BESIDE outputs wide, of which Triton's own are powers of two. STAYS: a program goes on to further
    tiles, and asks for the next one's first steps before it stores.
    """
    WIDE: tl.constexpr = BN + BESIDE
    tiles_n, tiles_t = tl.cdiv(N, WIDE), tl.cdiv(T, BT)
    start, programs = tl.program_id(0), tl.num_programs(0)
    # one round, known to be one, is no loop
    rounds = tl.cdiv(tiles_n * tiles_t * GROUPS - start, programs) if STAYS else 1
    for i in tl.range(0, rounds, flatten=STAYS):
        tile = start + i * programs
        i_n, i_t, i_g = tile % tiles_n, tile // tiles_n % tiles_t, tile // (tiles_n * tiles_t)
        i_j, i_i = i_g // B2, i_g % B2
        if PEAKS:
            b_peaks = peaks_of(peaks_ptr, i_i, PEAKS_J, B2, PEAKS_R, BS)
        acc = tl.zeros((BT, BN), tl.float32)
        if BESIDE:
            beside = tl.zeros((BT, BESIDE), tl.float32)
        for step in range(0, tl.cdiv(K, BK)):
            o_k, row = step * BK, i_n * WIDE
            b_a = load_tile(a, i_g // REPEAT, i_t * BT, o_k, T, K, stride_ag, stride_at, 1, BT, BK, TMA)
            b_b = load_tile(b, i_g, row, o_k, N, K, stride_bg, stride_bn, 1, BN, BK, TMA)
            acc = tl.dot(b_a, b_b.T, acc)
            if BESIDE:
                b_b = load_tile(b_beside, i_g, row + BN, o_k, N, K, stride_bg, stride_bn, 1, BESIDE, BK, TMA)
                beside = tl.dot(b_a, b_b.T, beside)
        peak = bound
        if PEAKS:
            peak *= tl.max(b_peaks, 0)
            peak = tl.sqrt(peak * peak + extra * extra)
        o_t, o_n = i_t * BT + tl.arange(0, BT), i_n * WIDE + tl.arange(0, BN)
        p_c = c_ptr + i_j.to(tl.int64) * stride_cj + i_i.to(tl.int64) * stride_ci
        finish(
            acc,
            p_c,
            b_scale_ptr,
            x_scale_ptr,
            pivots_ptr,
            bias_ptr,
            i_g,
            o_t,
            o_n,
            T,
            N,
            stride_ct,
            stride_cn,
            stride_pt,
            peak,
            FIRST,
            SCALED,
            PIVOTS,
            HAS_BIAS,
            ACTIVATION,
        )
        if BESIDE:
            finish(
                beside,
                p_c,
                b_scale_ptr,
                x_scale_ptr,
                pivots_ptr,
                bias_ptr,
                i_g,
                o_t,
                i_n * WIDE + BN + tl.arange(0, BESIDE),
                T,
                N,
                stride_ct,
                stride_cn,
                stride_pt,
                peak,
                FIRST,
                SCALED,
                PIVOTS,
                HAS_BIAS,
                ACTIVATION,
            )
    if EMITS:
        peak = bound
        if PEAKS:
            peak *= tl.max(peaks_of(peaks_ptr, 0, PEAKS_J, B2, PEAKS_R, BS), 0)
            peak = tl.sqrt(peak * peak + extra * extra)
        for step in range(start, tl.cdiv(T, BT), programs):
            o_t = step * BT + tl.arange(0, BT)
            tl.store(row_scale_ptr + o_t, tl.load(x_scale_ptr + o_t, mask=o_t < T, other=0.0) * peak, mask=o_t < T)
        for step in range(start, tl.cdiv(LAST, BN), programs):
            o_l = step * BN + tl.arange(0, BN)
            b_l = tl.load(last_scale_ptr + o_l, mask=o_l < LAST, other=0.0)
            tl.store(column_scale_ptr + o_l, b_l.to(tl.float32), mask=o_l < LAST)


class Peak(NamedTuple):
    """What no result of a first stage exceeds, relative to the norm of a token.

    In output block i it is sqrt((bound * max of peaks[:, i])^2 + extra^2); without peaks it is bound.
    """

    bound: float = 1.0
    #: `[J, B2, R]`, contiguous
    peaks: torch.Tensor | None = None
    extra: float = 0.0


def peak_of_codes(length, scale=None, extra=0.0):
    """Of products with rows of `length` codes, of which none exceeds the largest, and their scale `[J, B2, R]`."""
    return Peak(LONGER * LARGEST * math.sqrt(length), scale, extra)


class EmittedScales(NamedTuple):
    """What the first stage also stores for a last one by cuBLAS, which takes scales in float32: no kernel more.

    rows `[T]` is x_scale times the peak, columns `[N]` is last_scale `[N]` of the last stage's weights.
    """

    x_scale: torch.Tensor
    last_scale: torch.Tensor
    rows: torch.Tensor
    columns: torch.Tensor


def in_lines(like, *shape):
    """An empty tensor like `like` whose rows begin at lines of 128 bytes, so that no tile's row lies in one more."""
    *outer, length = shape
    return like.new_empty(*outer, -(-length // LINE) * LINE)[..., :length]


def float8_gemm(a, b, c, b_scale, peak, x_scale=None, pivots=None, bias=None, activation="", emitted=None):
    """c[j, i] = a[..] b[j * I + i]^T, scaled, into the strided view c `[J, I, T, N]`.

    Args:
        a: `[G, T, K]` float8; of as many matrices as c, or one for each j.
        b: `[J * I, N, K]` float8.
        c: float8 of a first stage; any dtype of a last one.
        b_scale: `[J * I, N]` in any shape, or None.
        peak: of the first stage, which divides by it, and of the last, which multiplies by it.
        x_scale: `[T]` of the last stage; None: this is the first.
        pivots: `[T, N]` float8, added to the results of the first stage.
        bias: `[I * N]`, or None.
        emitted: `EmittedScales` of a first stage with one c, or None.
    """
    (j, i, tokens, n), k = c.shape, b.shape[2]
    device = device_of(c)
    peaks = (1, 1, 1) if peak.peaks is None else peak.peaks.shape
    first = x_scale is None
    emits = emitted or (x_scale, None, None, None)

    def run(config):
        tma = device.has_tma and fits_tma(a) and fits_tma(b)
        tiles = triton.cdiv(n, config.outputs) * triton.cdiv(tokens, config.bt) * j * i
        float8_gemm_kernel[(min(tiles, config.stays * device.sms) if config.stays else tiles,)](
            descriptor(a, config.bt, config.bk) if tma else a,
            descriptor(b, config.bn, config.bk) if tma else b,
            descriptor(b, config.beside, config.bk) if tma and config.beside else b,
            c,
            b_scale,
            emits[0],
            peak.peaks,
            pivots,
            bias,
            *emits[1:],
            tokens,
            n,
            k,
            j * i,
            0 if emitted is None else emitted.columns.numel(),
            i,
            peaks[0],
            peaks[2],
            j * i // a.shape[0],
            *a.stride()[:2],
            *b.stride()[:2],
            *c.stride(),
            0 if pivots is None else pivots.stride(0),
            peak.bound,
            peak.extra,
            FIRST=first,
            SCALED=b_scale is not None,
            PEAKS=peak.peaks is not None,
            PIVOTS=pivots is not None,
            HAS_BIAS=bias is not None,
            ACTIVATION=activation,
            EMITS=emitted is not None,
            TMA=tma,
            STAYS=config.stays > 0,
            BS=min(2048, pow2(peaks[0] * peaks[2])),
            BT=config.bt,
            BN=config.bn,
            BESIDE=config.beside,
            BK=config.bk,
            num_warps=config.warps,
            num_stages=config.stages,
        )

    rule = float8_config(tokens, n, k, j * i, device)
    launch(run, "float8_gemm", rule, tokens, (j * i, n, k, first, bool(activation)), c)
