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
from hf_blr.ops.triton.bits import Weights, weights_of
from hf_blr.ops.triton.one_rows import layers_apart, places_of_rows, product_of, rows_of, scales_of, vector_of
from hf_blr.ops.triton.tiles import end_after_previous, start_beside_previous, wait_for_previous
from hf_blr.ops.triton.tuned import launch


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
    GROUPED: tl.constexpr,
    PDL: tl.constexpr,
    BESIDE: tl.constexpr,
    VEC: tl.constexpr,
    VEC_W: tl.constexpr,
    WHOLE: tl.constexpr,
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
    LAYERS: tl.constexpr = 2 if GATED else 1
    stride_wl, stride_wq = tl.cast(GATED_BLOCKS, tl.int64) * (stride_wi * VEC_W), stride_wq * VEC_W
    b_ws = rows_of(w_ptr, i_p, Q, C, stride_wl, stride_wq, WHOLE, STEPS, TAIL, LAYERS, BX, BQ, BC)
    stride_sl = GATED_BLOCKS * stride_si
    b_ss = ()
    if FORM != "plain":
        b_ss = scales_of(ws_ptr, i_p, Q, C, stride_sl, stride_sq, PER, SCALED, WHOLE, STEPS, TAIL, LAYERS, BX, BQ, BC)
    # a kernel that did not wait asks L2, where what others wrote is
    CACHE: tl.constexpr = ".cg" if BESIDE else ""
    if BESIDE:
        start_beside_previous(PDL)
    else:
        wait_for_previous(PDL)
    x_ptr += (i_i % BLOCKS) * (stride_xi * VEC) + (i_i // BLOCKS) * (stride_xl * VEC)
    stride_xg *= VEC
    b_xs, b_ts = vector_of(x_ptr, R * VEC, 0, stride_xg, CACHE, FORM, PER, STEPS, LAYERS, BX, BQ, BC), ()
    if TAIL > 0:
        b_ts = vector_of(x_ptr, R * VEC, STEPS * BC, stride_xg, CACHE, FORM, PER, 1, LAYERS, BX, BQ, TAIL)
    tiles = tl.cdiv(Q, BQ // LAYERS)
    for i_q in tl.range(i_p, tiles, n_p):
        o_q = places_of_rows(i_q, LAYERS, BX, BQ)
        o_n = i_i * Q + layers_apart(GATED_BLOCKS * Q, LAYERS, BX, BQ) + o_q
        b_v, b_s = b_ws, b_ss
        if i_q + n_p < tiles:
            b_ws = rows_of(w_ptr, i_q + n_p, Q, C, stride_wl, stride_wq, WHOLE, STEPS, TAIL, LAYERS, BX, BQ, BC)
            if FORM != "plain":
                b_ss = scales_of(
                    ws_ptr, i_q + n_p, Q, C, stride_sl, stride_sq, PER, SCALED, WHOLE, STEPS, TAIL, LAYERS, BX, BQ, BC
                )
        b_out = product_of(b_xs, b_ts, b_v, b_s, bias_ptr, o_n, o_q < Q, FORM, PER, SCALED, STEPS, TAIL, HAS_BIAS)
        if GATED:
            b_gate, b_up = tl.split(tl.permute(tl.reshape(b_out, (BQ // BX, 2, BX // 2)), (0, 2, 1)))
            b_out = tl.reshape(activate(b_gate, ACTIVATION) * b_up, (BQ // 2,))
            o_q = places_of_rows(i_q, 1, BX // 2, BQ // 2)
        else:
            b_out = activate(b_out, ACTIVATION)
        o_o = (o_q // GROUP) * stride_og + i_i * GROUP + o_q % GROUP if GROUPED else i_i * Q + o_q
        tl.store(out_ptr + o_o, b_out.to(out_ptr.dtype.element_ty), mask=o_q < Q)
    if BESIDE:
        end_after_previous(PDL)


def project_one(x: Tensor, v: Tensor | Weights, z: Tensor):
    """Stage one of Monarch and low-rank: z `[B2, 1, B1*r]` from x `[1, K]` and v `[B1, B2*r, P]`."""
    b1, rows, p = v.shape
    # row i*r + k of block j goes to z[i, 0, j*r + k]
    multiply(x, v, None, z, b1, group=rows // len(z), strides=(p, 0, 0), stride_og=z.stride(0))


def expand_one(
    z: Tensor,
    u: Tensor | Weights,
    bias: Tensor | None,
    out: Tensor,
    activation: str = "",
    gated: bool = False,
    beside: bool = False,
):
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
    multiply(z, u, bias, out, blocks, q, strides, 0, len(z), activation, gated, beside)


def multiply(
    x, w, bias, out, blocks, group, strides, stride_og, x_blocks=None, activation="", gated=False, beside=False
):
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
        rule = packed_one_config(r, q * all_blocks, layers, w.per, device)

    def run(config):
        programs = max(1, config.programs * device.sms // blocks)
        columns, step = triton.cdiv(r, w.per), config.length // w.per
        # columns that a thread reads at once
        per_thread = 16 // w.data.element_size() if w.form == "plain" else word_vector(w.per)
        steps, tail = steps_of(columns, step, step if w.form == "plain" else 32 * per_thread)
        # rows of a layer that the warps hold side by side
        side = min(config.rows, max(1, 32 * config.warps * per_thread // step // layers))
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
            GROUPED=group < q,
            PDL=device.has_pdl,
            BESIDE=beside,
            VEC=vec,
            VEC_W=vec_w,
            WHOLE=columns // step,
            STEPS=steps,
            TAIL=tail,
            BX=layers * side,
            BQ=layers * config.rows,
            BC=config.length // w.per,
            num_warps=config.warps,
            maxnreg=config.registers,
            **device.launch_options,
        )

    launch(run, w.named("decode_one"), rule, 1, (r, q, blocks, gated), x)
