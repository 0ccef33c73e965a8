"""Small device-side helpers: masked tiles, Hopper's dependent launches, cache prefetch."""

import triton
import triton.language as tl
from triton.language.extra import cuda as tl_cuda


@triton.jit
def load_tile(
    src,
    i_g,
    row,
    col,
    rows,
    cols,
    stride_g,
    stride_r,
    stride_c,
    BR: tl.constexpr,
    BC: tl.constexpr,
    TMA: tl.constexpr,
):
    """[BR, BC] of matrix i_g of a stack, zero outside; src is a descriptor if TMA, else a pointer."""
    if TMA:
        b = src.load([i_g, row, col]).reshape(BR, BC)
    else:
        o_r = row + tl.arange(0, BR)
        o_c = col + tl.arange(0, BC)
        m = (o_r < rows)[:, None] & (o_c < cols)[None, :]
        o = o_r.to(tl.int64)[:, None] * stride_r + o_c[None, :] * stride_c
        b = tl.load(src + tl.cast(i_g, tl.int64) * stride_g + o, mask=m, other=0.0)
    return b


@triton.jit
def mix_of(
    s_ptr,
    i_r,
    R,
    stride_si,
    stride_sj,
    B1: tl.constexpr,
    B2: tl.constexpr,
    BI: tl.constexpr,
    BJ: tl.constexpr,
    BR: tl.constexpr,
):
    """Tile i_r of s `[B2, B1, R]`, `[BI, BJ, BR]`, zero outside."""
    o_i, o_j, o_r = tl.arange(0, BI), tl.arange(0, BJ), i_r * BR + tl.arange(0, BR)
    o = o_i[:, None, None] * stride_si + o_j[None, :, None] * stride_sj + o_r[None, None, :]
    m = (o_i < B2)[:, None, None] & (o_j < B1)[None, :, None] & (o_r < R)[None, None, :]
    return tl.load(s_ptr + o, mask=m, other=0.0)


@triton.jit
def is_feature(b_index, K):
    """Whether these indices name one of K features: those of a damaged file may name memory of somebody else."""
    return (b_index >= 0) & (b_index < K)


@triton.jit
def in_part(o_p, o_j, P, K):
    """[BJ, BP]: which of the places o_p lie in their part, of length P from o_j on; the last part may be shorter."""
    return (o_p < P)[None, :] & (o_j[:, None] + o_p[None, :] < K)


@triton.jit
def wait_for_previous(PDL: tl.constexpr):
    """Block until the kernel before has finished, then let the kernel after begin, up to its own wait."""
    if PDL:
        tl_cuda.gdc_wait()
        tl_cuda.gdc_launch_dependents()


@triton.jit
def start_beside_previous(PDL: tl.constexpr):
    """For a kernel that needs nothing of the one before it, which itself began by `wait_for_previous`.

    What that one has waited for is there: all its programs have passed their wait when this kernel begins.
    """
    if PDL:
        tl_cuda.gdc_launch_dependents()


@triton.jit
def end_after_previous(PDL: tl.constexpr):
    """The last step of such a kernel: who waits for it waits for the kernel before it too."""
    if PDL:
        tl_cuda.gdc_wait()


@triton.jit
def wait_past_loads(PDL: tl.constexpr):
    """As `wait_for_previous`, within a loop whose pipelined loads do not depend on the kernel before and may pass it.

    Triton's own operation, from 3.7 on, keeps a loop from being pipelined.
    """
    if PDL:
        tl.inline_asm_elementwise(
            "griddepcontrol.wait; griddepcontrol.launch_dependents; mov.u32 $0, 0;",
            "=r,~{memory}",
            [],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )


@triton.jit
def prefetch_to_l2(ptr, o, m):
    """Ask for the cache lines at ptr + o: safe before the wait, since no value is read."""
    tl.inline_asm_elementwise(
        "{ .reg .pred p; setp.ne.s32 p, $2, 0; @p prefetch.global.L2 [$1]; mov.u32 $0, 0; }",
        "=r,l,r",
        [ptr + o, m.to(tl.int32)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )
