"""What programs of `decode_places` put out: rows with bias and activation, or in float32 the parts of rows too long for
one program, which one kernel more adds.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from hf_blr.ops.rules.device import device_of
from hf_blr.ops.triton.activate import activate
from hf_blr.ops.triton.tiles import wait_for_previous


@triton.jit
def sum_of_last(b, COUNT: tl.constexpr):
    """The sum over the last axis, of COUNT numbers. A thread has all of them, so that none change places twice."""
    if COUNT == 1:
        b_sum = tl.reshape(b, b.shape[:-1])
    else:
        b_left, b_right = tl.split(tl.reshape(b, b.shape[:-1] + (COUNT // 2, 2)))
        b_sum = sum_of_last(b_left + b_right, COUNT // 2)
    return b_sum


@triton.jit
def put_rows(
    acc,
    ws_ptr,
    bias_ptr,
    out_ptr,
    o_si,
    o_q,
    i_i,
    T,
    Q,
    GROUP,
    GATED_BLOCKS,
    stride_og,
    stride_ot,
    stride_sq,
    HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    ADD: tl.constexpr,
    SCALED: tl.constexpr,
):
    """Store what `decode_places_kernel` says of its rows o_q, from their sums by parts `[BJ, BQ, BT]`."""
    BJ: tl.constexpr = acc.shape[0]
    BQ: tl.constexpr = acc.shape[1]
    BT: tl.constexpr = acc.shape[2]
    o_t, m_q = tl.arange(0, BT), o_q < Q
    if SCALED == 0:
        o_s = o_si[:, None] + (o_q * stride_sq)[None, :]
        acc *= tl.load(ws_ptr + o_s, mask=m_q[None, :], other=0.0).to(tl.float32)[:, :, None]
    o_n = i_i * Q + o_q
    if GATED:
        b_parts = tl.permute(tl.reshape(acc, (BJ // 2, 2, BQ, BT)), (2, 3, 1, 0))
        b_out, b_up = tl.split(sum_of_last(b_parts, BJ // 2))
    else:
        b_out = sum_of_last(tl.permute(acc, (1, 2, 0)), BJ)
    if HAS_BIAS:
        b_out += tl.load(bias_ptr + o_n, mask=m_q, other=0.0).to(tl.float32)[:, None]
    out_ptr += ((o_q // GROUP) * stride_og + i_i * GROUP + o_q % GROUP)[:, None] + o_t.to(tl.int64)[None, :] * stride_ot
    m = m_q[:, None] & (o_t < T)[None, :]
    if ADD:
        b_out += tl.load(out_ptr, mask=m, other=0.0).to(tl.float32)
    b_out = activate(b_out, ACTIVATION)
    if GATED:
        if HAS_BIAS:
            b_up += tl.load(bias_ptr + GATED_BLOCKS * Q + o_n, mask=m_q, other=0.0).to(tl.float32)[:, None]
        b_out *= b_up
    tl.store(out_ptr, b_out.to(out_ptr.dtype.element_ty), mask=m)


@triton.jit
def decode_sums_kernel(
    p_ptr,
    out_ptr,
    T,
    N,
    stride_ps,
    stride_og,
    stride_ot,
    ADD: tl.constexpr,
    PDL: tl.constexpr,
    SPLITS: tl.constexpr,
    BS: tl.constexpr,
    BN: tl.constexpr,
):
    """out[g, t, n] = sum_s p[s, g, t, n], always in the same order. ADD adds what out holds."""
    i_t, i_g = tl.program_id(1), tl.program_id(2)
    o_s, o_n = tl.arange(0, BS), tl.program_id(0) * BN + tl.arange(0, BN)
    m_n = o_n < N
    p_ptr += (i_g * T + i_t) * N + o_s[:, None] * stride_ps + o_n[None, :]
    wait_for_previous(PDL)
    b_out = tl.sum(tl.load(p_ptr, mask=(o_s < SPLITS)[:, None] & m_n[None, :], other=0.0), 0)
    out_ptr += i_g * stride_og + i_t * stride_ot + o_n
    if ADD:
        b_out += tl.load(out_ptr, mask=m_n, other=0.0).to(tl.float32)
    tl.store(out_ptr, b_out.to(out_ptr.dtype.element_ty), mask=m_n)


def sum_splits(parts: Tensor, out: Tensor, add: bool):
    """out `[G, T, N]`, or with `add` what it holds, plus the sum of parts `[S, G, T, N]`, contiguous, in float32."""
    splits, groups, tokens, n = parts.shape
    device = device_of(out)
    block = 128
    decode_sums_kernel[(triton.cdiv(n, block), tokens, groups)](
        parts,
        out,
        tokens,
        n,
        parts.stride(0),
        out.stride(0),
        out.stride(1),
        ADD=add,
        PDL=device.has_pdl,
        SPLITS=splits,
        BS=triton.next_power_of_2(splits),
        BN=block,
        num_warps=2,
        **device.launch_options,
    )
