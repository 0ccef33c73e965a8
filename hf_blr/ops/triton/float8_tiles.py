"""The kernel of `float8_gemm`: tiles of a stack of products, scaled while they are stored."""

from __future__ import annotations

import triton
import triton.language as tl

from hf_blr.ops.triton.activate import activate
from hf_blr.ops.triton.tiles import load_tile, start_beside_previous


@triton.jit
def peaks_of(peaks_ptr, o_i, J, B2, R, stride_j, BI: tl.constexpr, BS: tl.constexpr):
    """`[BI, BS]`, whose largest of each row is that of peaks[:, o_i] of peaks `[J, B2, R]`.

    The largest is found later: what only loads makes nobody wait.
    """
    b_peaks = tl.zeros((BI, BS), tl.float32)
    for step in range(0, tl.cdiv(J * R, BS)):
        o = step * BS + tl.arange(0, BS)[None, :]
        o_p = (o // R) * stride_j + o_i[:, None] * R + o % R
        m = (o < J * R) & (o_i < B2)[:, None]
        b_peaks = tl.maximum(b_peaks, tl.load(peaks_ptr + o_p, mask=m, other=0.0).to(tl.float32))
    return b_peaks


@triton.jit
def finish(
    acc,
    c_ptr,
    b_scale_ptr,
    x_scale_ptr,
    pivots_ptr,
    bias_ptr,
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
    """Scale the sums `[BT, BN]` of tokens o_t and outputs o_n and store them in c `[T, N]`, see the kernel.

    Scales of b and biases `[N]` are those of this product.
    """
    m_t, m_n = o_t < T, o_n < N
    if SCALED:
        acc *= tl.load(b_scale_ptr + o_n, mask=m_n, other=0.0).to(tl.float32)[None, :]
    if PIVOTS:
        o_p = o_t.to(tl.int64)[:, None] * stride_pt + o_n[None, :]
        acc += tl.load(pivots_ptr + o_p, mask=m_t[:, None] & m_n[None, :], other=0.0).to(tl.float32)
    if FIRST:
        acc *= 1 / peak
    else:
        acc *= (tl.load(x_scale_ptr + o_t, mask=m_t, other=0.0) * peak)[:, None]
    if HAS_BIAS:
        acc += tl.load(bias_ptr + o_n, mask=m_n, other=0.0).to(tl.float32)[None, :]
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
    STACKED,
    stride_ag,
    stride_at,
    stride_bg,
    stride_bn,
    stride_sg,
    stride_cj,
    stride_ci,
    stride_ct,
    stride_cn,
    stride_pt,
    stride_peaks,
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
    PDL: tl.constexpr,
    STAYS: tl.constexpr,
    BI: tl.constexpr,
    BS: tl.constexpr,
    BT: tl.constexpr,
    BN: tl.constexpr,
    BESIDE: tl.constexpr,
    BK: tl.constexpr,
):
    """c[g] = a[g // REPEAT] b[g]^T for a `[G/REPEAT, T, K]`, b `[G, N, K]`, with scales; group g is pair (j, i) of B2.

    b lies as `[G/STACKED, STACKED*N, K]`, and so does b's scale `[G, N]`, by which SCALED multiplies columns. PIVOTS
    adds those `[T, N]` to the results. No result of the first stage exceeds `peak` times the norm of a token; FIRST
    divides by it, so that results fit c's float8, and the last stage multiplies by it and by x_scale `[T]`. peaks `[J,
    B2, R]`: see `Peak`. EMITS: see `EmittedScales`.
    A tile is BN + BESIDE outputs wide, of which Triton's own are powers of two. STAYS: a program goes on to further
    tiles, and asks for the next one's first steps before it stores. PDL: the next kernel may start beside
    this one.
    """
    start_beside_previous(PDL)
    WIDE: tl.constexpr = BN + BESIDE
    tiles_n, tiles_t = tl.cdiv(N, WIDE), tl.cdiv(T, BT)
    start, programs = tl.program_id(0), tl.num_programs(0)
    # one round, known to be one, is no loop
    rounds = tl.cdiv(tiles_n * tiles_t * GROUPS - start, programs) if STAYS else 1
    o_i = tl.arange(0, BI)
    if PEAKS and STAYS:
        of_blocks = tl.max(peaks_of(peaks_ptr, o_i, PEAKS_J, B2, PEAKS_R, stride_peaks, BI, BS), 1)
    peak = bound
    for i in tl.range(0, rounds, flatten=STAYS):
        tile = start + i * programs
        i_n, i_t, i_g = tile % tiles_n, tile // tiles_n % tiles_t, tile // (tiles_n * tiles_t)
        i_j, i_i = i_g // B2, i_g % B2
        i_b, first = i_g // STACKED, i_g % STACKED * N
        if PEAKS and not STAYS:
            of_block = peaks_of(peaks_ptr, i_i + tl.arange(0, 1), PEAKS_J, B2, PEAKS_R, stride_peaks, 1, BS)
        acc = tl.zeros((BT, BN), tl.float32)
        if BESIDE:
            beside = tl.zeros((BT, BESIDE), tl.float32)
        for step in range(0, tl.cdiv(K, BK)):
            o_k, row = step * BK, first + i_n * WIDE
            b_a = load_tile(a, i_g // REPEAT, i_t * BT, o_k, T, K, stride_ag, stride_at, 1, BT, BK, TMA)
            b_b = load_tile(b, i_b, row, o_k, first + N, K, stride_bg, stride_bn, 1, BN, BK, TMA)
            acc = tl.dot(b_a, b_b.T, acc)
            if BESIDE:
                b_b = load_tile(b_beside, i_b, row + BN, o_k, first + N, K, stride_bg, stride_bn, 1, BESIDE, BK, TMA)
                beside = tl.dot(b_a, b_b.T, beside)
        if PEAKS:
            largest = tl.max(tl.where(o_i == i_i, of_blocks, 0.0), 0) if STAYS else tl.max(tl.max(of_block, 1), 0)
            peak = bound * largest
            peak = tl.sqrt(peak * peak + extra * extra)
        p_c = c_ptr + i_j.to(tl.int64) * stride_cj + i_i.to(tl.int64) * stride_ci
        p_scale = b_scale_ptr + i_b * stride_sg + first if SCALED else b_scale_ptr
        p_bias = bias_ptr + i_g * N if HAS_BIAS else bias_ptr
        for part in tl.static_range(2 if BESIDE else 1):
            finish(
                beside if part else acc,
                p_c,
                p_scale,
                x_scale_ptr,
                pivots_ptr,
                p_bias,
                i_t * BT + tl.arange(0, BT),
                i_n * WIDE + BN + tl.arange(0, BESIDE) if part else i_n * WIDE + tl.arange(0, BN),
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
        for step in range(start, tl.cdiv(T, BT), programs):
            o_t = step * BT + tl.arange(0, BT)
            tl.store(row_scale_ptr + o_t, tl.load(x_scale_ptr + o_t, mask=o_t < T, other=0.0) * peak, mask=o_t < T)
        for step in range(start, tl.cdiv(LAST, BN), programs):
            o_l = step * BN + tl.arange(0, BN)
            b_l = tl.load(last_scale_ptr + o_l, mask=o_l < LAST, other=0.0)
            tl.store(column_scale_ptr + o_l, b_l.to(tl.float32), mask=o_l < LAST)
