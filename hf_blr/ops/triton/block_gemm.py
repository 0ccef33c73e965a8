"""A stack of matrix products: every stage of every structure at many tokens is one of these."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from hf_blr.ops.rules.device import device_of, dot_precision
from hf_blr.ops.rules.products import gemm_config
from hf_blr.ops.triton.activate import activate
from hf_blr.ops.triton.tiles import load_tile
from hf_blr.ops.triton.tuned import launch


@triton.jit
def block_gemm_kernel(
    a,
    b,
    c_ptr,
    bias_ptr,
    T,
    N,
    KC,
    CHUNKS,
    stride_ag,
    stride_at,
    stride_ak,
    stride_bg,
    stride_bn,
    stride_bk,
    stride_cg,
    stride_ct,
    stride_cn,
    SWAP: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
    BT: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """c[g] = activation(a[g] b[g]^T + bias[g]) for a `[G, T, K]`, b `[G, N, K]`, c `[G, T, N]`.

    SWAP reads Monarch's y `[CHUNKS, T, G*KC]` in place as a[g] `[T, CHUNKS*KC]`: the two block indices change
    places.
    """
    i_n, i_t, i_g = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    steps = tl.cdiv(KC, BK)
    acc = tl.zeros((BT, BN), tl.float32)
    for step in range(0, CHUNKS * steps):
        i_c = step // steps
        o_k = (step % steps) * BK
        if SWAP:
            o_a, o_b = i_g * KC, i_c * KC
            b_a = load_tile(a, i_c, i_t * BT, o_a + o_k, T, o_a + KC, stride_ag, stride_at, stride_ak, BT, BK, TMA)
            b_b = load_tile(b, i_g, i_n * BN, o_b + o_k, N, o_b + KC, stride_bg, stride_bn, stride_bk, BN, BK, TMA)
        else:
            b_a = load_tile(a, i_g, i_t * BT, o_k, T, KC, stride_ag, stride_at, stride_ak, BT, BK, TMA)
            b_b = load_tile(b, i_g, i_n * BN, o_k, N, KC, stride_bg, stride_bn, stride_bk, BN, BK, TMA)
        acc = tl.dot(b_a, b_b.T, acc, input_precision=PRECISION)
    o_t = i_t * BT + tl.arange(0, BT)
    o_n = i_n * BN + tl.arange(0, BN)
    if HAS_BIAS:
        acc += tl.load(bias_ptr + i_g * N + o_n, mask=o_n < N, other=0.0).to(tl.float32)[None, :]
    acc = activate(acc, ACTIVATION)
    o = i_g.to(tl.int64) * stride_cg + o_t.to(tl.int64)[:, None] * stride_ct + o_n[None, :] * stride_cn
    tl.store(c_ptr + o, acc.to(c_ptr.dtype.element_ty), mask=(o_t < T)[:, None] & (o_n < N)[None, :])


def block_gemm(a, b, c, bias=None, swap=False, activation=""):
    """c[g] = activation(a[g] b[g]^T + bias[g]) into the strided view c `[G, T, N]`; `swap`: a is Monarch's y."""
    (groups, tokens, n), k = c.shape, b.shape[2]
    chunks = a.shape[0] if swap else 1
    chunk = k // chunks
    device = device_of(c)
    rule = gemm_config(chunk if swap else 1 << 10, tokens, c.element_size(), device, bool(activation))

    def run(config):
        tma = device.has_tma and fits_tma(a) and fits_tma(b) and not (swap and chunk % config.bk)
        grid = (triton.cdiv(n, config.bn), triton.cdiv(tokens, config.bt), groups)
        block_gemm_kernel[grid](
            descriptor(a, config.bt, config.bk) if tma else a,
            descriptor(b, config.bn, config.bk) if tma else b,
            c,
            bias,
            tokens,
            n,
            chunk,
            chunks,
            *a.stride(),
            *b.stride(),
            *c.stride(),
            SWAP=swap,
            HAS_BIAS=bias is not None,
            ACTIVATION=activation,
            TMA=tma,
            PRECISION=dot_precision(c.dtype),
            BT=config.bt,
            BN=config.bn,
            BK=config.bk,
            num_warps=config.warps,
            num_stages=config.stages,
        )

    launch(run, "block_gemm", rule, tokens, (groups, n, k, chunks, bool(activation)), c)


def expand(z, u, bias, out, activation=""):
    """out[i] = activation(z[i] u[i]^T + bias[i]) into the strided view out `[B2, T, Q]`; cuBLAS only multiplies."""
    if bias is None and not activation:
        torch.bmm(z, u.transpose(1, 2), out=out)
    else:
        block_gemm(z, u, out, bias=bias, activation=activation)


def fits_tma(t: torch.Tensor) -> bool:
    """Whether a tensor descriptor can describe t: contiguous rows that start on 16-byte boundaries."""
    aligned = all(s * t.element_size() % 16 == 0 for s in t.stride()[:-1])
    return t.stride(-1) == 1 and aligned and t.data_ptr() % 16 == 0


def descriptor(t: torch.Tensor, rows: int, cols: int):
    """The tensor descriptor that loads tiles [1, rows, cols] of a stack of matrices t, zero outside."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor(t, list(t.shape), list(t.stride()), [1, rows, cols])
