"""Monarch's step between its products: what belongs to one output block, side by side."""

from __future__ import annotations

import triton
import triton.language as tl

from hf_blr.ops.rules.columns import swap_config
from hf_blr.ops.rules.device import device_of
from hf_blr.ops.triton.tuned import launch


@triton.jit
def swap_blocks_kernel(
    y_ptr,
    z_ptr,
    T,
    B2,
    R,
    stride_yj,
    stride_yt,
    stride_zi,
    stride_zt,
    BT: tl.constexpr,
    BC: tl.constexpr,
):
    """z[i, t, j*R + r] = y[j, t, i*R + r]; a program takes all output blocks i of some tokens and one input block j."""
    i_t, i_j = tl.program_id(0), tl.program_id(1)
    o_t = (i_t * BT + tl.arange(0, BT)).to(tl.int64)
    y_ptr += i_j.to(tl.int64) * stride_yj + o_t[:, None] * stride_yt
    z_ptr += i_j * R + o_t[:, None] * stride_zt
    for i_c in range(0, tl.cdiv(B2 * R, BC)):
        o_c = i_c * BC + tl.arange(0, BC)
        m = (o_t < T)[:, None] & (o_c < B2 * R)[None, :]
        b_y = tl.load(y_ptr + o_c[None, :], mask=m)
        tl.store(z_ptr + ((o_c // R).to(tl.int64) * stride_zi + o_c % R)[None, :], b_y, mask=m)


def swap_blocks(y, b2):
    """z `[B2, T, B1*r]`, a copy of y `[B1, T, B2*r]`."""
    b1, tokens, rows = y.shape
    r = rows // b2
    if r % 16:
        # our kernel moves such pieces number by number (8192 x 4 x 80, H100: 18 us, PyTorch's some 9)
        return y.view(b1, tokens, b2, r).permute(2, 1, 0, 3).reshape(b2, tokens, b1 * r)
    z = y.new_empty(b2, tokens, b1 * r)

    def run(config):
        swap_blocks_kernel[(triton.cdiv(tokens, config.bt), b1)](
            y,
            z,
            tokens,
            b2,
            r,
            *y.stride()[:2],
            *z.stride()[:2],
            BT=config.bt,
            BC=config.bc,
            num_warps=config.warps,
        )

    launch(run, "swap_blocks", swap_config(device_of(y)), tokens, (b1, b2, r), y)
    return z
