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
from hf_blr.ops.rules.packed import packed_one_config, steps_of, word_vector
from hf_blr.ops.triton.activate import activate
from hf_blr.ops.triton.bits import Weights, by_place, sum_of_columns, weights_of
from hf_blr.ops.triton.halves import paired
from hf_blr.ops.triton.tiles import wait_for_previous
from hf_blr.ops.triton.tuned import launch


@triton.jit
def rows_of(w_ptr, i_q, Q, C, stride_wq, STEPS: tl.constexpr, TAIL: tl.constexpr, BQ: tl.constexpr, BC: tl.constexpr):
    """Tile i_q of a matrix `[Q, C]` in STEPS pieces `[BQ, BC]` and, if TAIL > 0, one `[BQ, TAIL]`; zero outside.

    Read once, so the first to leave L2.
    """
    o_q = i_q * BQ + tl.arange(0, BQ)
    # steps are distances that a load's own offset holds
    row_ptr, m_q = w_ptr + o_q[:, None] * stride_wq, (o_q < Q)[:, None]
    pieces = ()
    for step in tl.static_range(STEPS):
        o_c = step * BC + tl.arange(0, BC)
        m = m_q & (o_c < C)[None, :]
        pieces = pieces + (tl.load(row_ptr + o_c[None, :], mask=m, other=0, eviction_policy="evict_first"),)
    if TAIL > 0:
        o_c = STEPS * BC + tl.arange(0, TAIL)
        m = m_q & (o_c < C)[None, :]
        pieces = pieces + (tl.load(row_ptr + o_c[None, :], mask=m, other=0, eviction_policy="evict_first"),)
    return pieces


@triton.jit
def scales_of(
    s_ptr,
    i_q,
    Q,
    C,
    stride_sq,
    FORM: tl.constexpr,
    PER: tl.constexpr,
    GROUP: tl.constexpr,
    STEPS: tl.constexpr,
    TAIL: tl.constexpr,
    BQ: tl.constexpr,
    BC: tl.constexpr,
):
    """Of the same tile in bits: the scale of each column in pieces like the tile's, or `[BQ]` of each row."""
    o_q = i_q * BQ + tl.arange(0, BQ)
    pieces = ()
    if FORM != "plain":
        if GROUP == 0:
            pieces = pieces + (tl.load(s_ptr + o_q * stride_sq, mask=o_q < Q, other=0.0),)
        else:
            row_ptr, m_q = s_ptr + o_q[:, None] * stride_sq, (o_q < Q)[:, None]
            for step in tl.static_range(STEPS):
                o_c = step * BC + tl.arange(0, BC)
                m = m_q & (o_c < C)[None, :]
                pieces = pieces + (tl.load(row_ptr + (o_c * PER // GROUP)[None, :], mask=m, other=0.0),)
            if TAIL > 0:
                o_c = STEPS * BC + tl.arange(0, TAIL)
                m = m_q & (o_c < C)[None, :]
                pieces = pieces + (tl.load(row_ptr + (o_c * PER // GROUP)[None, :], mask=m, other=0.0),)
    return pieces


@triton.jit
def vector_of(
    x_ptr, R, FIRST, FORM: tl.constexpr, PER: tl.constexpr, STEPS: tl.constexpr, BX: tl.constexpr, BC: tl.constexpr
):
    """What `paired` makes of x `[R]` in STEPS pieces of BC columns from FIRST on, for equal rows.

    Each warp loads what it needs and asks no other.
    """
    pieces = ()
    for step in tl.static_range(STEPS):
        o_r = (FIRST + step * BC) * PER + tl.arange(0, BC * PER)
        o_r = tl.broadcast_to(o_r[None, None, :], (1, BX, BC * PER))
        tiles = by_place(tl.load(x_ptr + o_r, mask=o_r < R, other=0.0), FORM)
        for j in tl.static_range(PER):
            pieces = pieces + (tl.reshape(tiles[j], (BX, BC)),)
    return paired(pieces, 0, STEPS, FORM, PER)


@triton.jit
def product_of(
    b_xs,
    b_ts,
    b_ws,
    b_ss,
    bias_ptr,
    o_n,
    m_q,
    FORM: tl.constexpr,
    PER: tl.constexpr,
    GROUP: tl.constexpr,
    STEPS: tl.constexpr,
    TAIL: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    """`[BQ]`: the rows times the vector, b_xs and of the tail b_ts, plus the bias."""
    b_out = tl.sum(sum_of_columns(b_xs, b_ws, b_ss, 0, STEPS, FORM, PER, GROUP), 1)
    if TAIL > 0:
        b_out += tl.sum(sum_of_columns(b_ts, b_ws, b_ss, STEPS, 1, FORM, PER, GROUP), 1)
    if FORM != "plain" and GROUP == 0:
        b_out *= b_ss[0].to(tl.float32)
    if HAS_BIAS:
        b_out += tl.load(bias_ptr + o_n, mask=m_q, other=0.0).to(tl.float32)
    return b_out


@triton.jit(do_not_specialize=["stride_wi", "stride_wq"])
def decode_one_kernel(
    x_ptr,
    w_ptr,
    ws_ptr,
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
    stride_si,
    stride_sq,
    HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    FORM: tl.constexpr,
    PER: tl.constexpr,
    SCALED: tl.constexpr,
    PDL: tl.constexpr,
    VEC: tl.constexpr,
    VEC_W: tl.constexpr,
    STEPS: tl.constexpr,
    TAIL: tl.constexpr,
    BX: tl.constexpr,
    BQ: tl.constexpr,
    BC: tl.constexpr,
):
    """out[q // GROUP, i, q % GROUP] = activation(w[i, q] . x[i] + bias[i, q]), with w `[blocks, Q, R]`.

    Blocks i from BLOCKS on belong to further layers, whose x lie stride_xl apart. GATED: out is that of block i times
    w[i + GATED_BLOCKS, q] . x + bias, whose x lies stride_xg behind. R and strides of x come / VEC, strides of w, in
    columns of PER numbers, / VEC_W. SCALED numbers of a row share a scale of ws, or all; w is read VEC_W columns at a
    time in bits, which makes a thread's words meet the numbers of x that it loads.
    """
    i_p, n_p, i_i = tl.program_id(0), tl.num_programs(0), tl.program_id(1)
    C = tl.cdiv(R * VEC, PER)
    w_ptr += i_i.to(tl.int64) * (stride_wi * VEC_W)
    if FORM != "plain":
        ws_ptr += i_i * stride_si
    b_ws = rows_of(w_ptr, i_p, Q, C, stride_wq * VEC_W, STEPS, TAIL, BQ, BC)
    b_ss = scales_of(ws_ptr, i_p, Q, C, stride_sq, FORM, PER, SCALED, STEPS, TAIL, BQ, BC)
    if GATED:
        w2_ptr = w_ptr + tl.cast(GATED_BLOCKS, tl.int64) * (stride_wi * VEC_W)
        ws2_ptr = ws_ptr if FORM == "plain" else ws_ptr + GATED_BLOCKS * stride_si
        b_w2s = rows_of(w2_ptr, i_p, Q, C, stride_wq * VEC_W, STEPS, TAIL, BQ, BC)
        b_s2s = scales_of(ws2_ptr, i_p, Q, C, stride_sq, FORM, PER, SCALED, STEPS, TAIL, BQ, BC)
    wait_for_previous(PDL)
    x_ptr += (i_i % BLOCKS) * (stride_xi * VEC) + (i_i // BLOCKS) * (stride_xl * VEC)
    b_xs, b_ts = vector_of(x_ptr, R * VEC, 0, FORM, PER, STEPS, BX, BC), ()
    if TAIL > 0:
        b_ts = vector_of(x_ptr, R * VEC, STEPS * BC, FORM, PER, 1, BX, TAIL)
    if GATED:
        x_ptr += stride_xg * VEC
        b_x2s, b_t2s = vector_of(x_ptr, R * VEC, 0, FORM, PER, STEPS, BX, BC), ()
        if TAIL > 0:
            b_t2s = vector_of(x_ptr, R * VEC, STEPS * BC, FORM, PER, 1, BX, TAIL)
    for i_q in tl.range(i_p, tl.cdiv(Q, BQ), n_p):
        b_next = rows_of(w_ptr, i_q + n_p, Q, C, stride_wq * VEC_W, STEPS, TAIL, BQ, BC)
        b_snext = scales_of(ws_ptr, i_q + n_p, Q, C, stride_sq, FORM, PER, SCALED, STEPS, TAIL, BQ, BC)
        if GATED:
            b_next2 = rows_of(w2_ptr, i_q + n_p, Q, C, stride_wq * VEC_W, STEPS, TAIL, BQ, BC)
            b_snext2 = scales_of(ws2_ptr, i_q + n_p, Q, C, stride_sq, FORM, PER, SCALED, STEPS, TAIL, BQ, BC)
        o_q = i_q * BQ + tl.arange(0, BQ)
        m_q, o_n = o_q < Q, i_i * Q + o_q
        b_out = product_of(b_xs, b_ts, b_ws, b_ss, bias_ptr, o_n, m_q, FORM, PER, SCALED, STEPS, TAIL, HAS_BIAS)
        b_out = activate(b_out, ACTIVATION)
        if GATED:
            o_n += GATED_BLOCKS * Q
            b_out *= product_of(
                b_x2s, b_t2s, b_w2s, b_s2s, bias_ptr, o_n, m_q, FORM, PER, SCALED, STEPS, TAIL, HAS_BIAS
            )
            b_w2s, b_s2s = b_next2, b_snext2
        o_o = (o_q // GROUP) * stride_og + i_i * GROUP + o_q % GROUP
        tl.store(out_ptr + o_o, b_out.to(out_ptr.dtype.element_ty), mask=m_q)
        b_ws, b_ss = b_next, b_snext


def project_one(x: Tensor, v: Tensor | Weights, z: Tensor):
    """Stage one of Monarch and low-rank: z `[B2, 1, B1*r]` from x `[1, K]` and v `[B1, B2*r, P]`."""
    b1, rows, p = v.shape
    # row i*r + k of block j goes to z[i, 0, j*r + k]
    multiply(x, v, None, z, b1, group=rows // len(z), strides=(p, 0, 0), stride_og=z.stride(0))


def expand_one(z: Tensor, u: Tensor | Weights, bias: Tensor | None, out: Tensor, activation: str = "", gated=False):
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
    w, device = weights_of(w), device_of(x)
    all_blocks, q, r = w.shape
    vec = vector_width(r, *strides)
    vec_w = vector_width(*w.strides)
    layers = 2 if gated else 1
    if w.form == "plain":
        rule = one_config(r, q * all_blocks, layers, w.data.element_size(), device)
    else:
        vec_w = min(vec_w, word_vector(w.per))
        rule = packed_one_config(r, layers, w.per, device)

    def run(config):
        programs = max(1, config.programs * device.sms // blocks)
        columns, step = triton.cdiv(r, w.per), config.length // w.per
        # what is masked costs arithmetic, which bounds words alone
        steps, tail = (triton.cdiv(columns, step), 0) if w.form == "plain" else steps_of(columns, step)
        # a warp that has whole rows to itself needs one copy of x
        alone = w.form != "plain" and config.length // w.per >= 32 * config.warps
        decode_one_kernel[(min(triton.cdiv(q, config.rows), programs), blocks)](
            x,
            w.data,
            w.scale,
            bias,
            out,
            q,
            group,
            x_blocks or blocks,
            blocks,
            stride_og,
            *(n // vec for n in (r, *strides)),
            *(n // vec_w for n in w.strides),
            *w.scale_strides,
            HAS_BIAS=bias is not None,
            ACTIVATION=activation,
            GATED=gated,
            FORM=w.form_on(device),
            PER=w.per,
            SCALED=w.group,
            PDL=device.has_pdl,
            VEC=vec,
            VEC_W=vec_w,
            STEPS=steps,
            TAIL=tail,
            BX=1 if alone else config.rows,
            BQ=config.rows,
            BC=config.length // w.per,
            num_warps=config.warps,
            **device.launch_options,
        )

    launch(run, w.named("decode_one"), rule, 1, (r, q, blocks, gated), x)
