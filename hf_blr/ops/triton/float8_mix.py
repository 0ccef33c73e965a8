"""BLAST's first stage in float8 with the mix in it: the y of each input block goes from its product into sums z.

z alone is stored, and rounded. y and z are scaled to e4m3's range by the bound of `Peak` before they are added up in
half precision, two numbers an instruction.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from hf_blr.ops.rules.device import INTERPRETER, device_of, pow2
from hf_blr.ops.rules.float8 import mixed_config, weights_config
from hf_blr.ops.triton.block_gemm import descriptor, fits_tma
from hf_blr.ops.triton.float8_gemm import Peak, peak_of_codes
from hf_blr.ops.triton.tiles import load_tile
from hf_blr.ops.triton.tuned import launch


@triton.jit
def mix_weights_kernel(
    s_ptr,
    scale_ptr,
    pairs_ptr,
    peaks_ptr,
    R,
    stride_si,
    stride_sj,
    B1: tl.constexpr,
    B2: tl.constexpr,
    BJ: tl.constexpr,
    BR: tl.constexpr,
):
    """peaks[i] = max_r ||(s scale)[i, :, r]|| and s scale / peaks, of s `[B2, B1, R]`, two output blocks a program.

    scale `[B1, R]` is that of v's rows. pairs `[B1, B2/2, R]` int32 hold those of blocks 2i and 2i + 1 as halves.
    """
    i_p = tl.program_id(0)
    o_j = tl.arange(0, BJ)
    m_j = (o_j < B1)[:, None]
    low, high = tl.zeros((BR,), tl.float32), tl.zeros((BR,), tl.float32)
    s_ptr += o_j[:, None] * stride_sj
    low_ptr = s_ptr + 2 * i_p.to(tl.int64) * stride_si
    # of an odd number the last block has itself beside it, which nobody reads
    high_ptr = s_ptr + tl.minimum(2 * i_p + 1, B2 - 1).to(tl.int64) * stride_si
    scale_ptr += o_j[:, None] * R
    for step in range(0, tl.cdiv(R, BR)):
        o_r = step * BR + tl.arange(0, BR)[None, :]
        m = m_j & (o_r < R)
        b_scale = tl.load(scale_ptr + o_r, mask=m, other=0.0).to(tl.float32)
        b_low = tl.load(low_ptr + o_r, mask=m, other=0.0).to(tl.float32) * b_scale
        b_high = tl.load(high_ptr + o_r, mask=m, other=0.0).to(tl.float32) * b_scale
        low, high = tl.maximum(low, tl.sum(b_low * b_low, 0)), tl.maximum(high, tl.sum(b_high * b_high, 0))
    # all of a block's s may be zero
    low_peak, high_peak = tl.maximum(tl.sqrt(tl.max(low, 0)), 1e-30), tl.maximum(tl.sqrt(tl.max(high, 0)), 1e-30)
    tl.store(peaks_ptr + 2 * i_p, low_peak)
    tl.store(peaks_ptr + 2 * i_p + 1, high_peak)
    pairs_ptr += i_p * R + o_j[:, None] * (tl.num_programs(0) * R)
    for step in range(0, tl.cdiv(R, BR)):
        o_r = step * BR + tl.arange(0, BR)[None, :]
        m = m_j & (o_r < R)
        b_scale = tl.load(scale_ptr + o_r, mask=m, other=0.0).to(tl.float32)
        b_low = tl.load(low_ptr + o_r, mask=m, other=0.0).to(tl.float32) * (b_scale / low_peak)
        b_high = tl.load(high_ptr + o_r, mask=m, other=0.0).to(tl.float32) * (b_scale / high_peak)
        tl.store(pairs_ptr + o_r, bits_of(b_low) | (bits_of(b_high) << 16), mask=m)


@triton.jit
def bits_of(numbers):
    """Those of half precision, in the low half of int32."""
    return numbers.to(tl.float16).to(tl.uint16, bitcast=True).to(tl.int32)


@triton.jit
def project_and_mix_kernel(
    x,
    v,
    z_ptr,
    pairs_ptr,
    T,
    R,
    P,
    stride_xj,
    stride_xt,
    stride_vj,
    stride_vr,
    factor,
    B1: tl.constexpr,
    B2: tl.constexpr,
    STEPS: tl.constexpr,
    TMA: tl.constexpr,
    PACKED: tl.constexpr,
    BT: tl.constexpr,
    BR: tl.constexpr,
    BP: tl.constexpr,
):
    """z[i] = sum_j weights[i, j] * (factor x[j] v[j]^T) for x `[B1, T, P]`, v `[B1, R, P]`, z `[B2, T, R]`.

    pairs holds the weights as in `mix_weights_kernel`. Tiles are of ranks by tokens: a thread of the tensor cores'
    layout then has many tokens of two ranks, and needs few weights. STEPS of BP make P; one loop runs over the steps of
    all j, so that loads go on ahead.
    """
    i_r, i_t = tl.program_id(0), tl.program_id(1)
    o_t, o_r = i_t * BT + tl.arange(0, BT), i_r * BR + tl.arange(0, BR)
    m_t, m_r = o_t < T, o_r < R
    HALVES: tl.constexpr = (B2 + 1) // 2
    b_zs = ()
    for _ in tl.static_range(2 * HALVES):
        b_zs = b_zs + (tl.zeros((BR, BT), tl.float16),)
    acc = tl.zeros((BR, BT), tl.float32)
    for step in range(0, B1 * STEPS):
        i_j, o_p = step // STEPS, (step % STEPS) * BP
        b_x = load_tile(x, i_j, i_t * BT, o_p, T, P, stride_xj, stride_xt, 1, BT, BP, TMA)
        b_v = load_tile(v, i_j, i_r * BR, o_p, R, P, stride_vj, stride_vr, 1, BR, BP, TMA)
        acc = tl.dot(b_v, b_x.T, acc)
        if step % STEPS == STEPS - 1:
            b_y = (acc * factor).to(tl.float16)
            b_sums = ()
            for i in tl.static_range(HALVES):
                b_pair = tl.load(pairs_ptr + (i_j * HALVES + i) * R + o_r, mask=m_r, other=0)
                b_sums = b_sums + (
                    multiply_add(half_of(b_pair), b_y, b_zs[2 * i], PACKED),
                    multiply_add(half_of(b_pair >> 16), b_y, b_zs[2 * i + 1], PACKED),
                )
            b_zs = b_sums
            acc = tl.zeros((BR, BT), tl.float32)
    z_ptr += o_t.to(tl.int64)[None, :] * R + o_r[:, None]
    m = m_t[None, :] & m_r[:, None]
    for i in tl.static_range(B2):
        tl.store(z_ptr + tl.cast(T, tl.int64) * R * i, b_zs[i].to(z_ptr.dtype.element_ty), mask=m)


@triton.jit
def half_of(bits):
    """The number of half precision in the low half of int32."""
    return bits.to(tl.int16).to(tl.float16, bitcast=True)


@triton.jit
def multiply_add(weights, b, c, PACKED: tl.constexpr):
    """weights `[BR]` times b `[BR, BT]` plus c, of half precision.

    PACKED: two numbers an instruction, which compilers do not find by themselves.
    """
    a = weights[:, None].broadcast_to(b.shape)
    if PACKED:
        out = tl.inline_asm_elementwise(
            "fma.rn.f16x2 $0, $1, $2, $3;", "=r,r,r,r", [a, b, c], dtype=tl.float16, is_pure=True, pack=2
        )
    else:
        out = a * b + c
    return out


def project_and_mix(x, v, v_scale, s):
    """(z `[B2, T, R]` float8, `Peak` of z) of x `[B1, T, P]` and v `[B1, R, P]`, both float8.

    v_scale `[B1, R, 1]` and s `[B2, B1, R]` are numbers.
    """
    (b1, tokens, p), (b2, _, r), device = x.shape, s.shape, device_of(x)
    pairs = s.new_empty(b1, (b2 + 1) // 2, r, dtype=torch.int32)
    peaks = s.new_empty(1, 2 * pairs.shape[1], 1, dtype=torch.float32)
    block, warps = weights_config(b1, r, device)
    mix_weights_kernel[(pairs.shape[1],)](
        s, v_scale, pairs, peaks, r, *s.stride()[:2], B1=b1, B2=b2, BJ=pow2(b1), BR=block, num_warps=warps
    )
    z, codes = x.new_empty(b2, tokens, r), peak_of_codes(p)

    def run(config):
        tma = device.has_tma and fits_tma(x) and fits_tma(v)
        project_and_mix_kernel[(triton.cdiv(r, config.bn), triton.cdiv(tokens, config.bt))](
            descriptor(x, config.bt, config.bk) if tma else x,
            descriptor(v, config.bn, config.bk) if tma else v,
            z,
            pairs,
            tokens,
            r,
            p,
            *x.stride()[:2],
            *v.stride()[:2],
            1 / codes.bound,
            B1=b1,
            B2=b2,
            STEPS=triton.cdiv(p, config.bk),
            TMA=tma,
            PACKED=device != INTERPRETER,
            BT=config.bt,
            BR=config.bn,
            BP=config.bk,
            num_warps=config.warps,
            num_stages=config.stages,
        )

    launch(run, "float8_project_and_mix", mixed_config(b2, p, device), tokens, (b1, b2, r, p), x)
    return z, Peak(codes.bound, peaks[:, :b2])
