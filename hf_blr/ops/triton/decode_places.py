"""1 to 32 tokens on weights in bits, multiplied place by place: their numbers stay in the thread that unpacks them.

A word holds numbers of several places, 0 to 7 of int4. Tensor cores take the numbers of one place of sixteen words with
the inputs that meet them. Inputs come in that order (`ops.rules.packed.CHUNK`), and the first stage stores for the
second so.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hf_blr.ops.rules.device import device_of, dot_precision, vector_width
from hf_blr.ops.rules.few_tokens import lines
from hf_blr.ops.rules.packed import CHUNK, PlacesConfig, padded, places_config, places_rows
from hf_blr.ops.triton.activate import activate
from hf_blr.ops.triton.bits import Weights, places_of
from hf_blr.ops.triton.tiles import prefetch_to_l2, wait_for_previous
from hf_blr.ops.triton.tuned import launch

#: layers whose first stages one launch can have
MOST_RANKS = 3


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
    PART,
    stride_xt,
    stride_xl,
    stride_sn,
    stride_ot,
    START_1,
    START_2,
    HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    TO_PLACES: tl.constexpr,
    LINES: tl.constexpr,
    LINE: tl.constexpr,
    FORM: tl.constexpr,
    PER: tl.constexpr,
    SCALED: tl.constexpr,
    PDL: tl.constexpr,
    PRECISION: tl.constexpr,
    VEC: tl.constexpr,
    CHUNK: tl.constexpr,
    BJ: tl.constexpr,
    BT: tl.constexpr,
    BN: tl.constexpr,
    BC: tl.constexpr,
):
    """out[t, n] = activation(sum over c and j of x[t, c, j] * number j of w[n, c], plus bias[n]), with w `[N, C]`.

    x has a token's numbers by chunks of CHUNK words, `[chunks, PER, CHUNK]`. C comes / VEC. The words are cut into BJ
    parts of PART words. A scale of ws is that of SCALED numbers, which steps of BC words divide, or of a row. The
    grid's second axis has further layers of N rows, with x stride_xl apart. GATED: out is that of a layer times what
    the next one gives without an activation. TO_PLACES stores in the order of x, each of up to three layers, whose rows
    begin at 0, START_1 and START_2, in chunks of its own.
    """
    i_n, i_l = tl.program_id(0), tl.program_id(1)
    o_t, o_c, o_b, o_n = tl.arange(0, BT), tl.arange(0, BC), tl.arange(0, BJ), tl.arange(0, BN)
    if GATED:
        # gate and up are parts beside each other
        o_l, o_j = o_b % 2, (o_b // 2) * PART
    else:
        o_l, o_j = o_b * 0 + i_l, o_b * PART
    start, stop, place = i_l * 0, N, i_n * BN
    o_out = i_l * N + place
    if TO_PLACES:
        SIZE: tl.constexpr = CHUNK * PER
        p_1 = tl.cdiv(START_1, SIZE) * SIZE
        p_2 = p_1 + tl.cdiv(START_2 - START_1, SIZE) * SIZE
        behind = i_n * BN
        start = tl.where(behind >= p_2, START_2, tl.where(behind >= p_1, START_1, 0))
        stop = tl.where(behind >= p_2, N, tl.where(behind >= p_1, START_2, START_1))
        o_out = tl.where(behind >= p_2, p_2, tl.where(behind >= p_1, p_1, 0))
        place = behind - o_out
    o_n += start + place
    m_t, m_n = o_t < T, o_n < stop
    columns = C * VEC
    # of whole chunks
    ends = tl.cdiv(columns, CHUNK) * CHUNK
    o_w = (o_l.to(tl.int64)[:, None] * N + o_n[None, :])[:, :, None] * columns + o_j[:, None, None]
    if LINES > 0:
        o_p = tl.arange(0, LINES) * LINE
        m_p = (o_p[None, :] < PART) & (o_j[:, None] + o_p[None, :] < columns)
        prefetch_to_l2(w_ptr, o_w + o_p[None, None, :], m_p[:, None, :] & m_n[None, :, None])
    o_s = (o_l[:, None] * N + o_n[None, :]) * stride_sn
    wait_for_previous(PDL)
    o_x = (o_l * stride_xl + o_j * PER)[:, None, None] + (o_t * stride_xt)[None, :, None]
    o_x += ((o_c // CHUNK) * (CHUNK * PER) + o_c % CHUNK)[None, None, :]
    acc = tl.zeros((BJ, BN, BT), tl.float32)
    for step in range(0, PART // BC):
        m_c = step * BC + o_j[:, None] + o_c[None, :]
        b_w = tl.load(
            w_ptr + o_w + (step * BC + o_c)[None, None, :],
            mask=(m_c < columns)[:, None, :] & m_n[None, :, None],
            other=0,
            eviction_policy="evict_first",
        )
        tiles = places_of(b_w, FORM, PER, x_ptr.dtype.element_ty)
        m_x = (m_c < ends)[:, None, :] & m_t[None, :, None]
        b = tl.zeros((BJ, BN, BT), tl.float32) if SCALED > 0 else acc
        for j in tl.static_range(PER):
            b_x = tl.load(x_ptr + o_x + (step * (BC * PER) + j * CHUNK), mask=m_x, other=0.0)
            b = tl.dot(tiles[j], tl.permute(b_x, (0, 2, 1)), b, input_precision=PRECISION)
        if SCALED > 0:
            first = step * BC + o_j
            m_s = (first < columns)[:, None] & m_n[None, :]
            b_s = tl.load(ws_ptr + o_s + (first * PER // SCALED)[:, None], mask=m_s, other=0.0)
            acc += b * b_s.to(tl.float32)[:, :, None]
        else:
            acc = b
    if SCALED == 0:
        acc *= tl.load(ws_ptr + o_s, mask=m_n[None, :], other=0.0).to(tl.float32)[:, :, None]
    if GATED:
        b_sums = tl.sum(tl.reshape(acc, (BJ // 2, 2, BN, BT)), 0)
        b_out, b_up = tl.split(tl.permute(b_sums, (1, 2, 0)))
    else:
        b_out = tl.sum(acc, 0)
    if HAS_BIAS:
        o_bias = bias_ptr + i_l * N + o_n
        b_out += tl.load(o_bias, mask=m_n, other=0.0).to(tl.float32)[:, None]
        if GATED:
            b_up += tl.load(o_bias + N, mask=m_n, other=0.0).to(tl.float32)[:, None]
    b_out = activate(b_out, ACTIVATION)
    if GATED:
        b_out *= b_up
    o_n = tl.arange(0, BN)
    if TO_PLACES:
        # a chunk's pad is stored too: sums without a weight, which are zero
        o_n += place
        o_n = (o_n // SIZE) * SIZE + (o_n % PER) * CHUNK + o_n % SIZE // PER
        m_n = o_n < tl.cdiv(stop - start, SIZE) * SIZE
    o_o = o_t.to(tl.int64)[None, :] * stride_ot + (o_out + o_n)[:, None]
    tl.store(out_ptr + o_o, b_out.to(out_ptr.dtype.element_ty), mask=m_n[:, None] & m_t[None, :])


def multiply(x, w: Weights, bias, out, activation="", layers=1, gated=False, ranks=()):
    """Launch the kernel; ranks: of up to three layers, of whose first stages w `[sum of ranks, K]` is."""
    rows, k = w.shape
    n, device, tokens = rows // layers // (1 + gated), device_of(x), len(x)
    columns = w.data.shape[1]
    vec, bt = vector_width(columns), places_rows(tokens)
    starts = [sum(ranks[:1]), sum(ranks[:2])] if ranks else [n, n]
    outputs = sum(padded(rank, w.per) for rank in ranks) if ranks else n

    def run(config: PlacesConfig):
        step = config.words
        part = triton.cdiv(triton.cdiv(columns, config.parts), step) * step
        decode_places_kernel[(triton.cdiv(outputs, config.rows), layers)](
            x,
            w.data,
            w.scale,
            bias,
            out,
            tokens,
            n,
            columns // vec,
            part,
            x.stride(0),
            padded(k, w.per),
            w.scale.stride(0),
            out.stride(0),
            *starts,
            HAS_BIAS=bias is not None,
            ACTIVATION=activation,
            GATED=gated,
            TO_PLACES=bool(ranks),
            LINES=lines(part, 32) if device.has_pdl else 0,
            LINE=32,
            FORM=w.form,
            PER=w.per,
            SCALED=w.group,
            PDL=device.has_pdl,
            PRECISION=dot_precision(x.dtype),
            VEC=vec,
            CHUNK=CHUNK,
            BJ=config.parts * (1 + gated),
            BT=bt,
            BN=config.rows,
            BC=step,
            num_warps=config.warps,
            # no more than a row has steps
            num_stages=min(config.stages, max(2, part // step + 1)),
            **device.launch_options,
        )

    rule = places_config(k, rows, 1 + gated, tokens, w.per, w.group, device)
    launch(run, w.named("decode_places"), rule, bt, (k, n, layers, gated, bool(ranks)), x)
