"""2 to 32 tokens on weights in bits, multiplied place by place: all stages but the first of BLAST.

A word holds numbers of several places, 0 to 7 of int4. Tensor cores take the numbers of one place of sixteen words with
the inputs that meet them, so that a number is multiplied by the thread that unpacked it. What a step of this layout
loads of x is split into places in registers as well, once for all tiles of rows. Each warp has a part of every row, so
that none reads the x of another. A batch of products, one for each part, keeps Triton from Hopper's products of four
warps, which would take every place of x through shared memory. Rows too long for that are shared by programs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from hf_blr.ops.rules.device import device_of, dot_precision, vector_width
from hf_blr.ops.rules.few_tokens import lines
from hf_blr.ops.rules.packed import (
    PlacesConfig,
    multiplies_by_places,
    places_config,
    places_inputs,
    places_rows,
    whole_groups,
)
from hf_blr.ops.triton.bits import Weights, by_place, places_of
from hf_blr.ops.triton.places_out import put_rows, sum_splits
from hf_blr.ops.triton.tiles import in_part, prefetch_to_l2, wait_for_previous
from hf_blr.ops.triton.tuned import launch


@triton.jit
def decode_places_kernel(
    x_ptr,
    w_ptr,
    ws_ptr,
    bias_ptr,
    out_ptr,
    T,
    Q,
    GROUP,
    BLOCKS,
    GATED_BLOCKS,
    stride_os,
    stride_og,
    stride_ot,
    PART,
    R,
    stride_xi,
    stride_xl,
    stride_xg,
    stride_xt,
    C,
    stride_wi,
    stride_wq,
    stride_si,
    stride_sq,
    HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    ADD: tl.constexpr,
    LINES: tl.constexpr,
    LINE: tl.constexpr,
    FORM: tl.constexpr,
    PER: tl.constexpr,
    SCALED: tl.constexpr,
    PDL: tl.constexpr,
    PRECISION: tl.constexpr,
    VEC: tl.constexpr,
    VEC_W: tl.constexpr,
    BJ: tl.constexpr,
    BX: tl.constexpr,
    BT: tl.constexpr,
    BQ: tl.constexpr,
    TILES: tl.constexpr,
    BC: tl.constexpr,
):
    """out[q // GROUP, t, i*GROUP + q % GROUP] = activation(w[i, q] . x[i, t] + bias[i, q]), with w `[blocks, Q, R]`.

    Blocks i from BLOCKS on belong to further layers, whose x lie stride_xl apart. GATED: out is that of block i times
    w[i + GATED_BLOCKS, q] . x + bias, whose x lies stride_xg behind. ADD adds what out holds. A program has TILES tiles
    of BQ rows. A row is cut into parts of PART words, BC a step: BJ of a program, and of as many as the grid's last
    axis, each of which puts out its own sum, stride_os apart. R and strides of x come / VEC, C and strides of w, in
    words of PER numbers, / VEC_W. SCALED numbers of a row share a scale of ws, which steps divide, or all.
    """
    i_q, i_i = tl.program_id(0), tl.program_id(1)
    o_q, o_b = i_q * (TILES * BQ) + tl.arange(0, BQ), tl.arange(0, BJ)
    # one token is loaded once for all columns of a tile
    o_tx = tl.arange(0, BX)
    m_tx = o_tx < T
    # of two gated layers, each has every other part
    o_g, o_j = (o_b % 2, o_b // 2 * PART) if GATED else (o_b * 0, (tl.program_id(2) * BJ + o_b) * PART)
    columns = C * VEC_W
    o_wi = (i_i + o_g * GATED_BLOCKS).to(tl.int64) * (stride_wi * VEC_W) + o_j
    if PDL:
        o_l = tl.arange(0, LINES) * LINE
        for tile in tl.static_range(TILES):
            o_n = o_q + tile * BQ
            m_l = in_part(o_l, o_j, PART, columns)[:, None, :] & (o_n < Q)[None, :, None]
            o_wn = o_wi[:, None, None] + o_n[None, :, None] * (stride_wq * VEC_W)
            prefetch_to_l2(w_ptr, o_wn + o_l[None, None, :], m_l)
    o_si = (i_i + o_g * GATED_BLOCKS) * stride_si
    wait_for_previous(PDL)
    x_ptr += (i_i % BLOCKS) * (stride_xi * VEC) + (i_i // BLOCKS) * (stride_xl * VEC)
    o_x = (o_g * (stride_xg * VEC))[:, None, None] + (o_tx * (stride_xt * VEC))[None, :, None]
    o_c, o_r = tl.arange(0, BC), tl.arange(0, BC * PER)
    accs = ()
    for _tile in tl.static_range(TILES):
        accs = accs + (tl.zeros((BJ, BQ, BT), tl.float32),)
    for step in range(0, PART // BC):
        o_jc = o_j + step * BC
        m_c = o_jc[:, None] + o_c[None, :] < columns
        o_jr = (o_jc * PER)[:, None] + o_r[None, :]
        m_x = (o_jr < R * VEC)[:, None, :] & m_tx[None, :, None]
        b_x = tl.load(x_ptr + o_x + o_jr[:, None, :], mask=m_x, other=0.0)
        b_xs = by_place(tl.broadcast_to(b_x, (BJ, BT, BC * PER)), FORM)
        sums = ()
        for tile in tl.static_range(TILES):
            o_n = o_q + tile * BQ
            o_w = o_wi[:, None, None] + o_n[None, :, None] * (stride_wq * VEC_W) + (step * BC + o_c)[None, None, :]
            m_w = m_c[:, None, :] & (o_n < Q)[None, :, None]
            b_w = tl.load(w_ptr + o_w, mask=m_w, other=0, eviction_policy="evict_first")
            b_ws = places_of(b_w, FORM, PER, b_x.dtype)
            b = tl.zeros((BJ, BQ, BT), tl.float32) if SCALED > 0 else accs[tile]
            for j in tl.static_range(PER):
                b = tl.dot(b_ws[j], tl.permute(b_xs[j], (0, 2, 1)), b, input_precision=PRECISION)
            if SCALED > 0:
                o_s = o_si[:, None] + (o_n * stride_sq)[None, :] + (o_jc * PER // SCALED)[:, None]
                b_s = tl.load(ws_ptr + o_s, mask=(o_jc < columns)[:, None] & (o_n < Q)[None, :], other=0.0)
                b = accs[tile] + b * b_s.to(tl.float32)[:, :, None]
            sums = sums + (b,)
        accs = sums
    out_ptr += tl.program_id(2).to(tl.int64) * stride_os
    for tile in tl.static_range(TILES):
        put_rows(
            accs[tile],
            ws_ptr,
            bias_ptr,
            out_ptr,
            o_si,
            o_q + tile * BQ,
            i_i,
            T,
            Q,
            GROUP,
            GATED_BLOCKS,
            stride_og,
            stride_ot,
            stride_sq,
            HAS_BIAS,
            ACTIVATION,
            GATED,
            ADD,
            SCALED,
        )


def by_places(w) -> bool:
    """Whether a factor is multiplied so: one in bits whose words, sixteen at a time, lie in one group."""
    return isinstance(w, Weights) and w.form != "plain" and multiplies_by_places(w.group, w.per)


def project_by_places(x, v: Weights, z, add=False):
    """Stage one of Monarch and low-rank as `decode_project.decode_project`."""
    b1, rows, p = v.shape
    strides = p, 0, 0, x.stride(0)
    multiply(x, v, None, z, b1, rows // len(z), strides, z.stride()[:2], add=add)


def expand_by_places(z, u: Weights, bias, out, activation="", gated=False):
    """Stage two as `decode_expand.decode_expand`; `gated` as of `decode_one.expand_one`, of any number of tokens."""
    blocks, q, r = u.shape
    blocks //= 1 + gated
    apart = r if len(z) == blocks else blocks * z.stride(0)
    strides = z.stride(0), r, apart, z.stride(1)
    multiply(z, u, bias, out, len(z), q, strides, (0, out.stride(0)), activation, gated)


def multiply(x, w: Weights, bias, out, x_blocks, group, strides, out_strides, activation="", gated=False, add=False):
    """Launch the kernel: `strides` of x are from block to block, layer to layer, to the gated layer, token to token."""
    all_blocks, q, r = w.shape
    device, tokens = device_of(x), out.shape[-2]
    layers = 1 + gated
    columns = w.data.shape[-1]
    vec, vec_w = vector_width(r, *strides), vector_width(columns, *w.strides)

    def run(config: PlacesConfig):
        config = whole_groups(config, w.per, w.group)
        # what a last stage does to its sums cannot wait for others
        splits = config.splits if out.dim() == 3 else 1
        part = triton.cdiv(triton.cdiv(columns, config.parts * splits), config.words) * config.words
        parts = config.parts * layers
        rows = config.rows * config.tiles
        # in float32, to be added by one kernel more
        sums = out if splits == 1 else out.new_empty((splits, *out.shape), dtype=torch.float32)
        decode_places_kernel[(triton.cdiv(q, rows), all_blocks // layers, splits)](
            x,
            w.data,
            w.scale,
            bias,
            sums,
            tokens,
            q,
            group,
            x_blocks,
            all_blocks // layers,
            sums.stride(0) if splits > 1 else 0,
            *(out_strides if splits == 1 else sums.stride()[1:3]),
            part,
            *(n // vec for n in (r, *strides)),
            *(n // vec_w for n in (columns, *w.strides)),
            *w.scale_strides,
            HAS_BIAS=bias is not None,
            ACTIVATION=activation,
            GATED=gated,
            ADD=add and splits == 1,
            LINES=lines(part, 32),
            LINE=32,
            FORM=w.form,
            PER=w.per,
            SCALED=w.group,
            PDL=device.has_pdl,
            PRECISION=dot_precision(x.dtype),
            VEC=vec,
            VEC_W=vec_w,
            BJ=parts,
            BX=places_inputs(tokens),
            BT=places_rows(tokens),
            BQ=config.rows,
            TILES=config.tiles,
            BC=config.words,
            # a warp has a part
            num_warps=parts,
            # no more than a row has steps
            num_stages=min(config.stages, max(2, part // config.words + 1)),
            **device.launch_options,
        )
        if splits > 1:
            sum_splits(sums, out, add)

    rule = places_config(r, all_blocks * q, layers, tokens, w.per, w.group, x.element_size(), device)
    launch(run, w.named("decode_places"), rule, tokens, (r, q, all_blocks, gated), x)
