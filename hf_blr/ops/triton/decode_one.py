"""One token: each output is the product of one row of weights with one vector, by programs that stay.

A program holds its vector in registers and asks for its next rows before it multiplies those that have come, so that
the memory never waits for the arithmetic. Such products are all stages but the first of BLAST, which `decode_one_mix`
has, and of pivoted layers, in `pivoted`.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from hf_blr.ops.rules.device import device_of, vector_width
from hf_blr.ops.rules.few_tokens import one_config
from hf_blr.ops.triton.activate import activate
from hf_blr.ops.triton.tiles import sum_of_products, wait_for_previous
from hf_blr.ops.triton.tuned import launch


@triton.jit
def rows_of(w_ptr, i_q, Q, R, stride_wq, STEPS: tl.constexpr, BQ: tl.constexpr, BR: tl.constexpr):
    """Tile i_q of a matrix `[Q, R]` in STEPS pieces `[BQ, BR]`, zero outside; read once, so the first to leave L2."""
    o_q = i_q * BQ + tl.arange(0, BQ)
    pieces = ()
    for step in tl.static_range(STEPS):
        o_r = step * BR + tl.arange(0, BR)
        m = (o_q < Q)[:, None] & (o_r < R)[None, :]
        o = o_q[:, None] * stride_wq + o_r[None, :]
        pieces = pieces + (tl.load(w_ptr + o, mask=m, other=0.0, eviction_policy="evict_first"),)
    return pieces


@triton.jit
def vector_of(x_ptr, R, STEPS: tl.constexpr, BQ: tl.constexpr, BR: tl.constexpr):
    """x `[R]` in STEPS pieces `[BQ, BR]` with equal rows: each warp loads what it needs and asks no other for it."""
    pieces = ()
    for step in tl.static_range(STEPS):
        o_r = tl.broadcast_to((step * BR + tl.arange(0, BR))[None, :], (BQ, BR))
        pieces = pieces + (tl.load(x_ptr + o_r, mask=o_r < R, other=0.0),)
    return pieces


@triton.jit
def product_of(b_xs, b_ws, bias_ptr, o_n, m_q, HAS_BIAS: tl.constexpr):
    """`[BQ]`: the rows times the vector, plus the bias."""
    b_out = tl.sum(sum_of_products(b_xs, b_ws), 1)
    if HAS_BIAS:
        b_out += tl.load(bias_ptr + o_n, mask=m_q, other=0.0).to(tl.float32)
    return b_out


@triton.jit
def decode_one_kernel(
    x_ptr,
    w_ptr,
    bias_ptr,
    out_ptr,
    Q,
    GROUP,
    BLOCKS,
    GATED_BLOCKS,
    stride_og,
    R,
    stride_xi,
    stride_xl,
    stride_xg,
    stride_wi,
    stride_wq,
    HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    PDL: tl.constexpr,
    VEC: tl.constexpr,
    STEPS: tl.constexpr,
    BQ: tl.constexpr,
    BR: tl.constexpr,
):
    """out[q // GROUP, i, q % GROUP] = activation(w[i, q] . x[i] + bias[i, q]), with w `[blocks, Q, R]`.

    Blocks i from BLOCKS on belong to further layers, whose x lie stride_xl apart. GATED: out is that of block i times
    w[i + GATED_BLOCKS, q] . x + bias, whose x lies stride_xg behind. R and strides of x and w come / VEC.
    """
    i_p, n_p, i_i = tl.program_id(0), tl.num_programs(0), tl.program_id(1)
    w_ptr += i_i.to(tl.int64) * (stride_wi * VEC)
    b_ws = rows_of(w_ptr, i_p, Q, R * VEC, stride_wq * VEC, STEPS, BQ, BR)
    if GATED:
        w2_ptr = w_ptr + tl.cast(GATED_BLOCKS, tl.int64) * (stride_wi * VEC)
        b_w2s = rows_of(w2_ptr, i_p, Q, R * VEC, stride_wq * VEC, STEPS, BQ, BR)
    wait_for_previous(PDL)
    x_ptr += (i_i % BLOCKS) * (stride_xi * VEC) + (i_i // BLOCKS) * (stride_xl * VEC)
    b_xs = vector_of(x_ptr, R * VEC, STEPS, BQ, BR)
    if GATED:
        b_x2s = vector_of(x_ptr + stride_xg * VEC, R * VEC, STEPS, BQ, BR)
    for i_q in tl.range(i_p, tl.cdiv(Q, BQ), n_p):
        b_next = rows_of(w_ptr, i_q + n_p, Q, R * VEC, stride_wq * VEC, STEPS, BQ, BR)
        if GATED:
            b_next2 = rows_of(w2_ptr, i_q + n_p, Q, R * VEC, stride_wq * VEC, STEPS, BQ, BR)
        o_q = i_q * BQ + tl.arange(0, BQ)
        m_q, o_n = o_q < Q, i_i * Q + o_q
        b_out = activate(product_of(b_xs, b_ws, bias_ptr, o_n, m_q, HAS_BIAS), ACTIVATION)
        if GATED:
            b_out *= product_of(b_x2s, b_w2s, bias_ptr, GATED_BLOCKS * Q + o_n, m_q, HAS_BIAS)
            b_w2s = b_next2
        o_o = (o_q // GROUP) * stride_og + i_i * GROUP + o_q % GROUP
        tl.store(out_ptr + o_o, b_out.to(out_ptr.dtype.element_ty), mask=m_q)
        b_ws = b_next


def project_one(x: Tensor, v: Tensor, z: Tensor):
    """Stage one of Monarch and low-rank: z `[B2, 1, B1*r]` from x `[1, K]` and v `[B1, B2*r, P]`."""
    _, rows, p = v.shape
    # row i*r + k of block j goes to z[i, 0, j*r + k]
    multiply(x, v, None, z, len(v), group=rows // len(z), strides=(p, 0, 0), stride_og=z.stride(0))


def expand_one(z: Tensor, u: Tensor, bias: Tensor | None, out: Tensor, activation: str = "", gated: bool = False):
    """Stage two of one token, as `decode_expand.decode_expand`.

    With `gated`, of two layers: out `[1, N]` is activation(the first's) * the second's, from u `[2*B2, Q, R]` and z
    `[B2, 1, 2*R]` or `[2*B2, 1, R]`.
    """
    blocks, q, r = u.shape
    apart = 0
    if gated:
        blocks //= 2
        apart = r if len(z) == blocks else blocks * z.stride(0)
    strides = z.stride(0), r, apart
    multiply(z, u, bias, out, blocks, q, strides, 0, len(z), activation, gated)


def multiply(x, w, bias, out, blocks, group, strides, stride_og, x_blocks=None, activation="", gated=False):
    """Launch `decode_one_kernel`: `strides` of x are from block to block, layer to layer and to the gated layer."""
    (all_blocks, q, r), device = w.shape, device_of(x)
    sizes = (r, *strides, *w.stride()[:2])
    vec = vector_width(*sizes)
    rule = one_config(r, q * all_blocks, 2 if gated else 1, w.element_size(), device)

    def run(config):
        programs = max(1, config.programs * device.sms // blocks)
        decode_one_kernel[(min(triton.cdiv(q, config.rows), programs), blocks)](
            x,
            w,
            bias,
            out,
            q,
            group,
            x_blocks or blocks,
            blocks,
            stride_og,
            *(n // vec for n in sizes),
            HAS_BIAS=bias is not None,
            ACTIVATION=activation,
            GATED=gated,
            PDL=device.has_pdl,
            VEC=vec,
            STEPS=triton.cdiv(r, config.length),
            BQ=config.rows,
            BR=config.length,
            num_warps=config.warps,
            **device.launch_options,
        )

    launch(run, "decode_one", rule, 1, (r, q, blocks, gated), w)
