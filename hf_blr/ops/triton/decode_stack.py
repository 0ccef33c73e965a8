"""Stage one at few tokens as a stack of products whose weights fill the long side of tensor cores' tiles.

`decode_project` reads 16 padded tokens or more for 8 or 16 rows of weights: all of x comes from L2 again for each of
these. Here 64 rows share it, which pays where x is large: at 17 tokens and more, and for long rows.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hf_blr.ops.rules.device import device_of, dot_precision, vector_width
from hf_blr.ops.rules.few_tokens import decode_rows, stack_config
from hf_blr.ops.rules.packed import within_groups
from hf_blr.ops.triton.bits import numbers_of, step_scale, weights_of
from hf_blr.ops.triton.tiles import wait_for_previous
from hf_blr.ops.triton.tuned import launch


@triton.jit
def decode_stack_kernel(
    x_ptr,
    v_ptr,
    c_ptr,
    out_ptr,
    T,
    ROWS,
    P,
    PART,
    stride_xt,
    stride_og,
    stride_oi,
    stride_ot,
    stride_vg,
    stride_vr,
    stride_cg,
    stride_cr,
    FORM: tl.constexpr,
    PER: tl.constexpr,
    SCALED: tl.constexpr,
    PDL: tl.constexpr,
    PRECISION: tl.constexpr,
    VEC: tl.constexpr,
    VEC_W: tl.constexpr,
    BT: tl.constexpr,
    BR: tl.constexpr,
    BP: tl.constexpr,
):
    """out[g, i, t, r] = sum_p x[t, g*P + p] v[g, i*PART + r, p]; P, PART and the strides come / VEC, those of
    v, in columns of PER numbers, / VEC_W. In bits, c holds v's scales, one for each row or for SCALED numbers of it,
    which steps divide.
    """
    i_r, i_g = tl.program_id(0), tl.program_id(1)
    o_t, o_r = tl.arange(0, BT), i_r * BR + tl.arange(0, BR)
    m_t, m_r = o_t < T, o_r < ROWS
    v_ptr += i_g.to(tl.int64) * (stride_vg * VEC_W)
    o_v, C = o_r.to(tl.int64)[:, None] * (stride_vr * VEC_W), tl.cdiv(P * VEC, PER)
    b_c = 0.0
    if FORM != "plain":
        c_ptr += i_g * stride_cg + o_r * stride_cr
        b_c = step_scale(c_ptr, m_r, 0, P * VEC, SCALED, BP)
    x_ptr += i_g * (P * VEC)
    o_x = o_t[:, None] * (stride_xt * VEC)
    wait_for_previous(PDL)
    acc = tl.zeros((BR, BT), tl.float32)
    for step in range(0, tl.cdiv(P * VEC, BP)):
        o_p = step * BP + tl.arange(0, BP)
        m_p = o_p < P * VEC
        b_x = tl.load(x_ptr + o_x + o_p[None, :], mask=m_t[:, None] & m_p[None, :], other=0.0)
        o_c = step * (BP // PER) + tl.arange(0, BP // PER)
        b_w = tl.load(v_ptr + o_v + o_c[None, :], mask=m_r[:, None] & (o_c < C)[None, :], other=0)
        b_v = numbers_of(b_w, FORM, b_x.dtype)
        if SCALED > 0:
            b_next = step_scale(c_ptr, m_r, step + 1, P * VEC, SCALED, BP)
            acc += tl.dot(b_v, b_x.T, input_precision=PRECISION) * b_c.to(tl.float32)[:, None]
            b_c = b_next
        else:
            acc = tl.dot(b_v, b_x.T, acc, input_precision=PRECISION)
    if FORM != "plain" and SCALED == 0:
        acc *= b_c.to(tl.float32)[:, None]
    part = PART * VEC
    o_o = i_g * (stride_og * VEC) + (o_r // part) * (stride_oi * VEC) + o_r % part
    out_ptr += o_o[:, None] + o_t[None, :] * (stride_ot * VEC)
    tl.store(out_ptr, acc.to(out_ptr.dtype.element_ty), mask=m_r[:, None] & m_t[None, :])


def project_swapped(x, v, z):
    """Monarch's z `[B2, T, B1*r]` from x `[T, K]` and v `[B1, B2*r, P]`, plain or in bits."""
    part = v.shape[1] // z.shape[0]
    launch_stack(x, v, z, part, (part, z.stride(0), z.stride(1)))


def project_stack(x, v, y):
    """y `[B1, T, R]` from x `[T, K]` and v `[B1, R, P]`, plain or in bits."""
    launch_stack(x, v, y, v.shape[1], (y.stride(0), 0, y.stride(1)))


def launch_stack(x, v, out, part, strides):
    """strides: of out's g, i and t, as the kernel calls them; `part`: how many r an i has."""
    v, tokens = weights_of(v), x.shape[0]
    groups, rows, p = v.shape
    device, bt = device_of(x), decode_rows(tokens)
    sizes = (p, part, x.stride(0), *strides)
    vec, vec_w = vector_width(*sizes), vector_width(*v.strides)

    def run(config):
        config = within_groups(config, v.group)
        decode_stack_kernel[(triton.cdiv(rows, config.rows), groups)](
            x,
            v.data,
            v.scale,
            out,
            tokens,
            rows,
            *(n // vec for n in sizes),
            *(n // vec_w for n in v.strides),
            *v.scale_strides,
            FORM=v.form,
            PER=v.per,
            SCALED=v.group,
            PDL=device.has_pdl,
            PRECISION=dot_precision(x.dtype),
            VEC=vec,
            VEC_W=vec_w,
            BT=bt,
            BR=config.rows,
            BP=config.length,
            num_warps=config.warps,
            num_stages=config.stages,
            **device.launch_options,
        )

    launch(run, v.named("decode_stack"), stack_config(tokens, x.element_size(), device), bt, (groups, rows, p, part), x)
