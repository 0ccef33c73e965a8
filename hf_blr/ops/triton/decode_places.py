"""2 to 32 tokens on weights in bits, multiplied place by place: their numbers stay in the thread that unpacks them.

A word holds numbers of several places, 0 to 7 of int4. Tensor cores take the numbers of one place of sixteen words with
the inputs that meet them. Inputs are put into that order once, since neighbours in a row of weights are not neighbours
there; the first stage stores for the second so.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_blr.ops.rules.device import device_of, dot_precision, vector_width
from hf_blr.ops.rules.few_tokens import decode_rows
from hf_blr.ops.rules.packed import parts_of, places_config, within_groups
from hf_blr.ops.triton.activate import activate
from hf_blr.ops.triton.bits import Weights, places_of
from hf_blr.ops.triton.tiles import wait_for_previous
from hf_blr.ops.triton.tuned import launch


@triton.jit
def to_places_kernel(x_ptr, out_ptr, K, stride_xt, PER: tl.constexpr, PDL: tl.constexpr, BC: tl.constexpr):
    """out[t, j, c] = x[t, c*PER + j]."""
    i_t, o_c = tl.program_id(1), tl.program_id(0) * BC + tl.arange(0, BC)
    o_j = tl.arange(0, PER)
    C = K // PER
    wait_for_previous(PDL)
    m = (o_c < C)[:, None]
    b_x = tl.load(x_ptr + i_t * stride_xt + o_c[:, None] * PER + o_j[None, :], mask=m, other=0.0)
    tl.store(out_ptr + i_t * K + o_j[None, :] * C + o_c[:, None], b_x, mask=m)


@triton.jit
def decode_places_kernel(
    x_ptr,
    w_ptr,
    ws_ptr,
    bias_ptr,
    out_ptr,
    T,
    N,
    C,
    STEPS,
    stride_os,
    stride_ot,
    stride_sn,
    HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    TO_PLACES: tl.constexpr,
    FORM: tl.constexpr,
    PER: tl.constexpr,
    SCALED: tl.constexpr,
    PDL: tl.constexpr,
    PRECISION: tl.constexpr,
    VEC: tl.constexpr,
    BT: tl.constexpr,
    BN: tl.constexpr,
    BC: tl.constexpr,
):
    """out[t, n] = activation(sum over j and c of x[t, j, c] * number j of w[n, c], plus bias[n]), with w `[N, C]`.

    C comes / VEC. A scale of ws is that of SCALED numbers, which steps of BC words divide, or of a row. TO_PLACES puts
    number n at place n % PER and column n // PER. The grid's second axis has parts of the sum, of STEPS steps each, and
    stride_os lies between their out.
    """
    i_s, o_n = tl.program_id(1), tl.program_id(0) * BN + tl.arange(0, BN)
    o_t, o_b = tl.arange(0, BT), tl.arange(0, BC)
    m_t, m_n = o_t < T, o_n < N
    columns = C * VEC
    o_w = w_ptr + o_n.to(tl.int64)[:, None] * columns
    ws_ptr += o_n * stride_sn
    wait_for_previous(PDL)
    acc = tl.zeros((BT, BN), tl.float32)
    for step in range(i_s * STEPS, tl.minimum((i_s + 1) * STEPS, tl.cdiv(columns, BC))):
        o_c = step * BC + o_b
        m_c = o_c < columns
        b_w = tl.load(o_w + o_c[None, :], mask=m_n[:, None] & m_c[None, :], other=0)
        tiles = places_of(b_w, FORM, PER, x_ptr.dtype.element_ty)
        b = tl.zeros((BT, BN), tl.float32)
        for j in tl.static_range(PER):
            o_x = x_ptr + (o_t * PER + j)[:, None] * columns + o_c[None, :]
            b_x = tl.load(o_x, mask=m_t[:, None] & m_c[None, :], other=0.0)
            b = tl.dot(b_x, tiles[j].T, b, input_precision=PRECISION)
        if SCALED > 0:
            b_s = tl.load(ws_ptr + step * (BC * PER) // SCALED, mask=m_n, other=0.0)
            acc += b * b_s.to(tl.float32)[None, :]
        else:
            acc += b
    if SCALED == 0:
        acc *= tl.load(ws_ptr, mask=m_n, other=0.0).to(tl.float32)[None, :]
    if HAS_BIAS:
        acc += tl.load(bias_ptr + o_n, mask=m_n, other=0.0).to(tl.float32)[None, :]
    b_out = activate(acc, ACTIVATION)
    if TO_PLACES:
        o_n = (o_n % PER) * (N // PER) + o_n // PER
    o_o = i_s * stride_os + o_t.to(tl.int64)[:, None] * stride_ot + o_n[None, :]
    tl.store(out_ptr + o_o, b_out.to(out_ptr.dtype.element_ty), mask=m_t[:, None] & m_n[None, :])


@triton.jit
def sum_parts_kernel(parts_ptr, out_ptr, SIZE, PARTS: tl.constexpr, PDL: tl.constexpr, BLOCK: tl.constexpr):
    """out = the sum of PARTS parts of SIZE numbers each."""
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    wait_for_previous(PDL)
    acc = tl.zeros((BLOCK,), tl.float32)
    for i in tl.static_range(PARTS):
        acc += tl.load(parts_ptr + i * SIZE + o, mask=o < SIZE, other=0.0)
    tl.store(out_ptr + o, acc.to(out_ptr.dtype.element_ty), mask=o < SIZE)


def to_places(x: Tensor, per: int) -> Tensor:
    """x `[T, K]` as `[T, per, K / per]`."""
    (tokens, k), device = x.shape, device_of(x)
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    to_places_kernel[(triton.cdiv(k // per, 128), tokens)](
        x, out, k, x.stride(0), PER=per, PDL=device.has_pdl, BC=128, num_warps=4, **device.launch_options
    )
    return out


def project(x: Tensor, w: Weights, y: Tensor):
    """y `[T, N]` in the order of places, from x `[T, PER, C]` and w `[N, R]`; of few rows the sum is cut into parts."""
    device, (tokens, n) = device_of(x), y.shape
    parts = parts_of(w.shape[0], w.shape[1], w.per, device)
    if parts == 1:
        return multiply(x, w, None, y[None], to_places=True)
    sums = x.new_empty(parts, tokens, n, dtype=torch.float32)
    multiply(x, w, None, sums, to_places=True)
    sum_parts_kernel[(triton.cdiv(y.numel(), 256),)](
        sums, y, y.numel(), PARTS=parts, PDL=device.has_pdl, BLOCK=256, num_warps=4, **device.launch_options
    )


def multiply(x: Tensor, w: Weights, bias: Tensor | None, out: Tensor, activation: str = "", to_places: bool = False):
    """out `[PARTS, T, N]`, a sum in so many parts, from x `[T, PER, C]`, as `to_places` makes it, and w `[N, R]`."""
    (n, r), tokens, device = w.shape, len(x), device_of(x)
    columns = r // w.per
    vec, bt = vector_width(columns), decode_rows(tokens)

    def run(config):
        step = within_groups(config, w.group).length // w.per
        decode_places_kernel[(triton.cdiv(n, config.rows), len(out))](
            x,
            w.data,
            w.scale,
            bias,
            out,
            tokens,
            n,
            columns // vec,
            triton.cdiv(triton.cdiv(columns, step), len(out)),
            *out.stride()[:2],
            w.scale.stride(0),
            HAS_BIAS=bias is not None,
            ACTIVATION=activation,
            TO_PLACES=to_places,
            FORM=w.form,
            PER=w.per,
            SCALED=w.group,
            PDL=device.has_pdl,
            PRECISION=dot_precision(x.dtype),
            VEC=vec,
            BT=bt,
            BN=config.rows,
            BC=step,
            num_warps=config.warps,
            num_stages=config.stages,
            **device.launch_options,
        )

    rule = places_config(n, tokens, w.per, device)
    launch(run, w.named("decode_places"), rule, bt, (n, r, len(out), bool(activation), to_places), x)


def low_rank_by_places(x: Tensor, u: Weights, v: Weights, bias: Tensor | None, activation: str) -> Tensor:
    """`[T, N]` from x `[T, K]`, u `[N, R]` and v `[R, K]`."""
    y, out = x.new_empty(len(x), v.shape[0]), x.new_empty(len(x), u.shape[0])
    project(to_places(x, v.per), v, y)
    multiply(y, u, bias, out[None], activation)
    return out
