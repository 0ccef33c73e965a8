"""BLAST's mix between two stages in float8: y and z are float8, the weights of the mix are not."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from hf_blr.ops.rules.device import device_of, pow2
from hf_blr.ops.rules.float8 import weights_config, words_config
from hf_blr.ops.triton.float8_gemm import LONGER
from hf_blr.ops.triton.mix import blast_mix
from hf_blr.ops.triton.tiles import wait_for_previous
from hf_blr.ops.triton.tuned import launch


@triton.jit
def mix_weights_kernel(
    s_ptr,
    scale_ptr,
    weights_ptr,
    peaks_ptr,
    R,
    stride_si,
    stride_sj,
    stride_wi,
    stride_wj,
    stride_wr,
    B1: tl.constexpr,
    LONGER: tl.constexpr,
    PDL: tl.constexpr,
    BJ: tl.constexpr,
    BR: tl.constexpr,
):
    """peaks[i] = LONGER * max_r ||(s scale)[i, :, r]|| and weights = s scale / peaks, of s `[B2, B1, R]`.

    scale `[B1, R]` is that of v's rows. One output block i a program.
    """
    i_i = tl.program_id(0)
    o_j = tl.arange(0, BJ)
    m_j = (o_j < B1)[:, None]
    s_ptr += i_i.to(tl.int64) * stride_si + o_j[:, None] * stride_sj
    largest = tl.zeros((BR,), tl.float32)
    for step in range(0, tl.cdiv(R, BR)):
        o_r = step * BR + tl.arange(0, BR)[None, :]
        m = m_j & (o_r < R)
        b_w = tl.load(s_ptr + o_r, mask=m, other=0.0).to(tl.float32)
        b_w *= tl.load(scale_ptr + o_j[:, None] * R + o_r, mask=m, other=0.0).to(tl.float32)
        largest = tl.maximum(largest, tl.sum(b_w * b_w, 0))
    # all of a block's s may be zero
    peak = tl.maximum(LONGER * tl.sqrt(tl.max(largest, 0)), 1e-30)
    # only what is stored waits: s and scales are the layer's own
    wait_for_previous(PDL)
    tl.store(peaks_ptr + i_i, peak)
    weights_ptr += i_i.to(tl.int64) * stride_wi + o_j[:, None] * stride_wj
    for step in range(0, tl.cdiv(R, BR)):
        o_r = step * BR + tl.arange(0, BR)[None, :]
        m = m_j & (o_r < R)
        b_w = tl.load(s_ptr + o_r, mask=m, other=0.0).to(tl.float32)
        b_w *= tl.load(scale_ptr + o_j[:, None] * R + o_r, mask=m, other=0.0).to(tl.float32)
        tl.store(weights_ptr + o_r * stride_wr, (b_w / peak).to(weights_ptr.dtype.element_ty), mask=m)


@triton.jit
def mix_words_kernel(
    y_ptr,
    weights_ptr,
    z_ptr,
    T,
    WORDS,
    stride_yj,
    stride_yt,
    stride_zi,
    stride_zt,
    B1: tl.constexpr,
    B2: tl.constexpr,
    PDL: tl.constexpr,
    BJ: tl.constexpr,
    BI: tl.constexpr,
    BT: tl.constexpr,
    BR: tl.constexpr,
):
    """z[i, t, r] = sum_j weights[r, i, j] y[j, t, r] on tensor cores; y and z hold four ranks in a 32-bit word.

    A rank's product wants its tokens in a row, where y has ranks: words change their order, in a quarter of the moves
    that their numbers would take.
    """
    i_r, i_t = tl.program_id(0), tl.program_id(1)
    wait_for_previous(PDL)
    o_r, o_t = i_r * BR + tl.arange(0, BR), i_t * BT + tl.arange(0, BT)
    o_j, o_i = tl.arange(0, BJ), tl.arange(0, BI)
    m_tr = (o_t < T)[:, None] & (o_r < WORDS)[None, :]
    o_y = o_j.to(tl.int64)[:, None, None] * stride_yj + o_t.to(tl.int64)[None, :, None] * stride_yt + o_r[None, None, :]
    b_y = tl.load(y_ptr + o_y, mask=(o_j < B1)[:, None, None] & m_tr[None, :, :], other=0)
    b_y = tl.permute(b_y, (2, 0, 1))
    m_w = (o_r < WORDS)[:, None, None] & (o_i < B2)[None, :, None] & (o_j < B1)[None, None, :]
    b_z = tl.zeros((BR, BI, BT), tl.int32)
    for place in tl.static_range(4):
        o_w = (o_r * 4 + place)[:, None, None] * (B2 * B1) + o_i[None, :, None] * B1 + o_j[None, None, :]
        b_w = tl.load(weights_ptr + o_w, mask=m_w, other=0.0)
        b_f = ((b_y >> (8 * place)) & 0xFF).to(tl.uint8).to(tl.float8e4nv, bitcast=True).to(b_w.dtype)
        b_f = tl.dot(b_w, b_f).to(tl.float8e4nv).to(tl.uint8, bitcast=True)
        b_z |= b_f.to(tl.int32) << (8 * place)
    o_z = o_i.to(tl.int64)[:, None, None] * stride_zi + o_t.to(tl.int64)[None, :, None] * stride_zt + o_r[None, None, :]
    tl.store(z_ptr + o_z, tl.permute(b_z, (1, 2, 0)), mask=(o_i < B2)[:, None, None] & m_tr[None, :, :])


def mix_weights(s, v_scale, by_words):
    """(weights, peaks `[B2]`): what y of the first stage, without v's scale, is mixed by; see `float8_gemm.Peak`.

    weights are `[B2, B1, R]` in the dtype of s; `by_words` it is float16, in whose range they are when divided by their
    peak, and blocks are contiguous.
    """
    b2, b1, r = s.shape
    peaks, device = s.new_empty(b2, dtype=torch.float32), device_of(s)
    weights = s.new_empty(r, b2, b1, dtype=torch.float16).permute(1, 2, 0) if by_words else torch.empty_like(s)
    block, warps = weights_config(b1, r, device)
    mix_weights_kernel[(b2,)](
        s,
        v_scale,
        weights,
        peaks,
        r,
        *s.stride()[:2],
        *weights.stride(),
        B1=b1,
        LONGER=LONGER,
        PDL=device.has_pdl,
        BJ=pow2(b1),
        BR=block,
        num_warps=warps,
        **device.launch_options,
    )
    return weights, peaks


def float8_mix(y, weights):
    """z `[B2, T, R]` float8 of y `[B1, T, R]` float8 and the weights of `mix_weights`."""
    (b2, b1, r), tokens = weights.shape, y.shape[1]
    if weights.stride(2) == 1:
        return blast_mix(y, weights)
    z, device = y.new_empty(b2, tokens, r), device_of(y)
    y_words, z_words = y.view(torch.int32), z.view(torch.int32)

    def run(config):
        grid = (triton.cdiv(r // 4, config.br), triton.cdiv(tokens, config.bt))
        mix_words_kernel[grid](
            y_words,
            weights,
            z_words,
            tokens,
            r // 4,
            *y_words.stride()[:2],
            *z_words.stride()[:2],
            B1=b1,
            B2=b2,
            PDL=device.has_pdl,
            BJ=max(16, pow2(b1)),
            BI=max(16, pow2(b2)),
            BT=config.bt,
            BR=config.br,
            num_warps=config.warps,
            **device.launch_options,
        )

    launch(run, "mix_words", words_config(b1, b2, device), tokens, (b1, b2, r), y)
    return z
