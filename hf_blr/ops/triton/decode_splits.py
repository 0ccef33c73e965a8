"""Sums of long rows that several programs share: each keeps its part in float32, and one kernel more adds the parts."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from hf_blr.ops.rules.device import device_of
from hf_blr.ops.triton.tiles import wait_for_previous


@triton.jit
def sum_splits_kernel(
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
    sum_splits_kernel[(triton.cdiv(n, block), tokens, groups)](
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
