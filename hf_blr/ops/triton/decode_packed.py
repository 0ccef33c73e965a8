"""2 to 32 tokens on weights in bits: both stages but the first of BLAST, by one kernel.

Unpacking is the work, not memory: each row is cut into as many parts as a program has warps, so that many warps unpack at
once and none waits for another before the end.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from hf_blr.ops.rules.device import device_of, dot_precision, vector_width
from hf_blr.ops.rules.few_tokens import decode_rows, lines
from hf_blr.ops.rules.packed import packed_rows_config, within_groups
from hf_blr.ops.triton.activate import activate
from hf_blr.ops.triton.bits import Weights, numbers_of
from hf_blr.ops.triton.tiles import in_part, prefetch_to_l2, wait_for_previous
from hf_blr.ops.triton.tuned import launch


@triton.jit
def decode_packed_kernel(
    x_ptr,
    w_ptr,
    ws_ptr,
    bias_ptr,
    out_ptr,
    T,
    Q,
    GROUP,
    BLOCKS,
    stride_og,
    stride_ot,
    P,
    R,
    stride_xi,
    stride_xl,
    stride_xt,
    stride_wi,
    stride_wq,
    stride_si,
    stride_sq,
    HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
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
    BT: tl.constexpr,
    BQ: tl.constexpr,
    BR: tl.constexpr,
):
    """out[q // GROUP, t, i*GROUP + q % GROUP] = activation(w[i, q] . x[i, t] + bias[i, q]), with w `[blocks, Q, R]`.

    Blocks i from BLOCKS on belong to further layers, whose x lie stride_xl apart. ADD adds what out holds. A row is cut
    into BJ parts of P, which words and groups divide. P, R and strides of x come / VEC, strides of w, in columns of PER
    numbers, / VEC_W. SCALED numbers of a row share a scale of ws, or all; steps divide them.
    """
    i_q, i_i = tl.program_id(0), tl.program_id(1)
    o_t, o_j, o_q = tl.arange(0, BT), tl.arange(0, BJ), i_q * BQ + tl.arange(0, BQ)
    m_t, m_q = o_t < T, o_q < Q
    # in numbers, and in columns
    o_jr, o_jc = o_j * (P * VEC), o_j * (P * VEC // PER)
    PC, C = P * VEC // PER, tl.cdiv(R * VEC, PER)
    w_ptr += i_i.to(tl.int64) * (stride_wi * VEC_W)
    o_w = o_jc[:, None, None] + o_q[None, :, None] * (stride_wq * VEC_W)
    if PDL:
        o_l = tl.arange(0, LINES) * LINE
        prefetch_to_l2(w_ptr, o_w + o_l[None, None, :], in_part(o_l, o_jc, PC, C)[:, None, :] & m_q[None, :, None])
    ws_ptr += i_i * stride_si + o_q[None, :] * stride_sq
    o_g = o_jr // SCALED if SCALED > 0 else o_jr * 0
    b_s = tl.load(ws_ptr + o_g[:, None], mask=m_q[None, :] & (o_jr < R * VEC)[:, None], other=0.0)
    wait_for_previous(PDL)
    x_ptr += (i_i % BLOCKS) * (stride_xi * VEC) + (i_i // BLOCKS) * (stride_xl * VEC)
    o_x = o_jr[:, None, None] + o_t[None, :, None] * (stride_xt * VEC)
    acc = tl.zeros((BJ, BT, BQ), tl.float32)
    for step in range(0, tl.cdiv(P * VEC, BR)):
        o_r, o_c = step * BR + tl.arange(0, BR), step * (BR // PER) + tl.arange(0, BR // PER)
        m_x = in_part(o_r, o_jr, P * VEC, R * VEC)[:, None, :] & m_t[None, :, None]
        b_x = tl.load(x_ptr + o_x + o_r[None, None, :], mask=m_x, other=0.0)
        m_w = in_part(o_c, o_jc, PC, C)[:, None, :] & m_q[None, :, None]
        b_w = tl.permute(numbers_of(tl.load(w_ptr + o_w + o_c[None, None, :], mask=m_w, other=0), FORM, b_x.dtype), (0, 2, 1))
        if SCALED > 0:
            o_next = o_jr + (step + 1) * BR
            b_next = tl.load(ws_ptr + (o_next // SCALED)[:, None], mask=m_q[None, :] & (o_next < R * VEC)[:, None], other=0.0)
            acc += tl.dot(b_x, b_w, input_precision=PRECISION) * b_s.to(tl.float32)[:, None, :]
            b_s = b_next
        else:
            acc = tl.dot(b_x, b_w, acc, input_precision=PRECISION)
    if SCALED == 0:
        acc *= b_s.to(tl.float32)[:, None, :]
    b_out = tl.sum(acc, 0)
    if HAS_BIAS:
        b_out += tl.load(bias_ptr + i_i * Q + o_q, mask=m_q, other=0.0).to(tl.float32)[None, :]
    out_ptr += ((o_q // GROUP) * stride_og + i_i * GROUP + o_q % GROUP)[None, :] + o_t.to(tl.int64)[:, None] * stride_ot
    m = m_t[:, None] & m_q[None, :]
    if ADD:
        b_out += tl.load(out_ptr, mask=m, other=0.0).to(tl.float32)
    b_out = activate(b_out, ACTIVATION)
    tl.store(out_ptr, b_out.to(out_ptr.dtype.element_ty), mask=m)


def project_packed(x: Tensor, v: Weights, z: Tensor, add: bool):
    """Stage one of Monarch and low-rank as `decode_project.decode_project`."""
    b1, rows, p = v.shape
    multiply(x, v, None, z, b1, rows // len(z), (p, 0, x.stride(0)), z.stride()[:2], add=add)


def expand_packed(z: Tensor, u: Weights, bias: Tensor | None, out: Tensor, activation: str):
    """Stage two as `decode_expand.decode_expand`."""
    _, q, r = u.shape
    multiply(z, u, bias, out, len(z), q, (z.stride(0), r, z.stride(1)), (0, out.stride(0)), activation)


def multiply(x, w: Weights, bias, out, blocks, group, strides, out_strides, activation="", add=False):
    """Launch the kernel: `strides` of x are from block to block, layer to layer and token to token."""
    all_blocks, q, r = w.shape
    device, tokens = device_of(out), out.shape[-2]
    line, bt = 128 // w.data.element_size(), decode_rows(tokens)

    def run(config):
        config = within_groups(config, w.group)
        # steps begin where words and groups do
        part = triton.cdiv(triton.cdiv(r, config.warps), config.length) * config.length
        vec, vec_w = vector_width(part, r, *strides), vector_width(*w.strides)
        decode_packed_kernel[(triton.cdiv(q, config.rows), all_blocks)](
            x,
            w.data,
            w.scale,
            bias,
            out,
            tokens,
            q,
            group,
            blocks,
            *out_strides,
            *(n // vec for n in (part, r, *strides)),
            *(n // vec_w for n in w.strides),
            *w.scale_strides,
            HAS_BIAS=bias is not None,
            ACTIVATION=activation,
            ADD=add,
            LINES=lines(part // w.per, line),
            LINE=line,
            FORM=w.form,
            PER=w.per,
            SCALED=w.group,
            PDL=device.has_pdl,
            PRECISION=dot_precision(x.dtype),
            VEC=vec,
            VEC_W=vec_w,
            BJ=config.warps,
            BT=bt,
            BQ=config.rows,
            BR=config.length,
            num_warps=config.warps,
            num_stages=config.stages,
            **device.launch_options,
        )

    rule = packed_rows_config(r, all_blocks * q, tokens, x.element_size(), device)
    launch(run, w.named("decode_packed"), rule, bt, (r, q, all_blocks, bool(activation)), out)
