"""A factor in bits as numbers, in one pass: what layers multiply that no kernel for bits takes."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_blr.ops.rules.device import INTERPRETER, device_of, vector_width
from hf_blr.ops.triton.bits import numbers_of, weights_in_bits


# neither says how anything lies in memory: what divides them would make kernels of their own
@triton.jit(do_not_specialize=["ROWS", "GROUPS"])
def numbers_kernel(
    w_ptr,
    s_ptr,
    out_ptr,
    ROWS,
    K,
    GROUPS,
    FORM: tl.constexpr,
    PER: tl.constexpr,
    SCALED: tl.constexpr,
    VEC: tl.constexpr,
    BN: tl.constexpr,
    BC: tl.constexpr,
):
    """out[n, k] = number k of row n of w, times the scale of its group; K comes / VEC."""
    o_n = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    o_c = tl.program_id(1) * BC + tl.arange(0, BC)
    o_k = tl.program_id(1) * (BC * PER) + tl.arange(0, BC * PER)
    m_n, C = o_n < ROWS, tl.cdiv(K * VEC, PER)
    b_w = tl.load(w_ptr + o_n[:, None] * C + o_c[None, :], mask=m_n[:, None] & (o_c < C)[None, :], other=0)
    m = m_n[:, None] & (o_k < K * VEC)[None, :]
    if SCALED > 0:
        b_s = tl.load(s_ptr + o_n[:, None] * GROUPS + (o_k // SCALED)[None, :], mask=m, other=0.0)
    else:
        b_s = tl.load(s_ptr + o_n, mask=m_n, other=0.0)[:, None]
    b = numbers_of(b_w, FORM, tl.float32) * b_s.to(tl.float32)
    tl.store(out_ptr + o_n[:, None] * (K * VEC) + o_k[None, :], b.to(out_ptr.dtype.element_ty), mask=m)


def numbers(codes: Tensor, scale: Tensor, bits: int, length: int, dtype: torch.dtype) -> Tensor:
    """The factor `[..., n, k]` in a dtype of 16 or 32 bits, each number rounded once; the tensors are contiguous."""
    w = weights_in_bits(codes, scale, bits, length)
    out = codes.new_empty(w.shape, dtype=dtype)
    rows, groups = out.numel() // length, scale.shape[-1]
    vec = vector_width(length)
    tile, columns = (4, 16) if device_of(codes) == INTERPRETER else (4, 1024 // w.per)
    numbers_kernel[(triton.cdiv(rows, tile), triton.cdiv(w.data.shape[-1], columns))](
        w.data,
        scale,
        out,
        rows,
        length // vec,
        groups,
        FORM=w.form,
        PER=w.per,
        SCALED=w.group,
        VEC=vec,
        BN=tile,
        BC=columns,
        num_warps=4,
    )
    return out
