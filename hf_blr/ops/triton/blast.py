"""BLAST: two stacks of products with a mix between them, apart or inside the second."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from hf_blr.ops.rules.blast import BlastRoute, blast_route
from hf_blr.ops.rules.device import device_of, dot_precision
from hf_blr.ops.rules.products import fused_mix_config
from hf_blr.ops.triton.activate import activate
from hf_blr.ops.triton.block_gemm import descriptor, expand, fits_tma
from hf_blr.ops.triton.decode_expand import decode_expand
from hf_blr.ops.triton.decode_project import decode_project
from hf_blr.ops.triton.decode_stack import project_stack
from hf_blr.ops.triton.mix import blast_mix, blast_mix_bwd, stack_along_t
from hf_blr.ops.triton.tiles import load_tile
from hf_blr.ops.triton.tuned import launch


@triton.jit
def blast_expand_kernel(
    y,
    u,
    s_ptr,
    bias_ptr,
    out_ptr,
    T,
    Q,
    R,
    B2,
    stride_yj,
    stride_yt,
    stride_si,
    stride_sj,
    stride_ui,
    stride_uq,
    stride_ot,
    B1: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
    BT: tl.constexpr,
    BQ: tl.constexpr,
    BR: tl.constexpr,
):
    """out[t, i*Q + q] = activation(sum_r (sum_j s[i,j,r] y[j,t,r]) u[i,q,r] + bias[i*Q + q]).

    y `[B1, T, R]`, u `[B2, Q, R]`; for S layers that share x, y `[B1, T, S*R]`, s `[B2, B1, S*R]` and u `[S*B2, Q, R]`.
    """
    # one layer after the other: y and u of all at once are more than L2 holds
    i_n, i_t, i_s = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    tiles_q = tl.cdiv(Q, BQ)
    i_b, i_q = i_n // tiles_q, i_n % tiles_q
    i_i, o_y = i_s * B2 + i_b, i_s * R
    acc = tl.zeros((BT, BQ), tl.float32)
    for step in range(0, tl.cdiv(R, BR)):
        o_r = step * BR + tl.arange(0, BR)
        b_u = load_tile(u, i_i, i_q * BQ, step * BR, Q, R, stride_ui, stride_uq, 1, BQ, BR, TMA)
        # mixed in the factors' own dtype: float32 here costs a fifth of the whole kernel (H100, 4x16 blocks)
        b_z = tl.zeros((BT, BR), b_u.dtype)
        for j in tl.static_range(B1):
            b_s = tl.load(s_ptr + i_b * stride_si + j * stride_sj + o_y + o_r, mask=o_r < R, other=0.0)
            b_y = load_tile(y, j, i_t * BT, o_y + step * BR, T, o_y + R, stride_yj, stride_yt, 1, BT, BR, TMA)
            b_z += b_s[None, :] * b_y
        acc = tl.dot(b_z, b_u.T, acc, input_precision=PRECISION)
    o_t = i_t * BT + tl.arange(0, BT)
    o_q = i_q * BQ + tl.arange(0, BQ)
    if HAS_BIAS:
        acc += tl.load(bias_ptr + i_i * Q + o_q, mask=o_q < Q, other=0.0).to(tl.float32)[None, :]
    o = o_t.to(tl.int64)[:, None] * stride_ot + (i_i * Q + o_q)[None, :]
    acc = activate(acc, ACTIVATION)
    tl.store(out_ptr + o, acc.to(out_ptr.dtype.element_ty), mask=(o_t < T)[:, None] & (o_q < Q)[None, :])


def blast_expand(y, u, s, bias, out, activation=""):
    """out `[T, N]` from y `[B1, T, R]`, the mix included.

    For S layers that share x: out `[T, S*N]` from y `[B1, T, S*R]`, u `[S*B2, Q, R]` and s `[B2, B1, S*R]`.
    """
    (_, q, r), (b1, tokens, width), b2 = u.shape, y.shape, s.shape[0]
    device = device_of(y)
    rule = fused_mix_config(b1, y.element_size(), device)

    def run(config):
        # a descriptor cuts off at the end of y, not of one layer's part of it
        whole = width == r or r % config.bk == 0
        tma = device.has_tma and fits_tma(y) and fits_tma(u) and whole
        grid = (b2 * triton.cdiv(q, config.bn), triton.cdiv(tokens, config.bt), width // r)
        blast_expand_kernel[grid](
            descriptor(y, config.bt, config.bk) if tma else y,
            descriptor(u, config.bn, config.bk) if tma else u,
            s,
            bias,
            out,
            tokens,
            q,
            r,
            b2,
            *y.stride()[:2],
            *s.stride()[:2],
            *u.stride()[:2],
            out.stride(0),
            B1=b1,
            HAS_BIAS=bias is not None,
            ACTIVATION=activation,
            TMA=tma,
            PRECISION=dot_precision(y.dtype),
            BT=config.bt,
            BQ=config.bn,
            BR=config.bk,
            num_warps=config.warps,
            num_stages=config.stages,
        )

    launch(run, "blast_expand", rule, tokens, (b1, b2, q, r, width), y)


def forward(x, u, s, v, bias, keep=False, activation=""):
    """x `[T, K]` -> `[T, N]`, and y `[B1, T, R]` if asked to keep it.

    u `[B2, Q, R]`, s `[B2, B1, R]`, v `[B1, R, P]`, u and v in bits up to 32 tokens without `keep`; bias `[N]` or None.
    """
    tokens, (b1, r, p), (b2, q, _) = x.shape[0], v.shape, u.shape
    out, empty = x.new_empty(tokens, b2 * q), x.new_empty(0)
    if tokens == 0:
        return out, x.new_empty(b1, 0, r) if keep else empty
    adds = bias is not None or bool(activation)
    route = blast_route(tokens, (b1, b2), (p, q, r), device_of(x), adds, keep)
    if route.few:
        decode_expand(blast_decode(x, s, v, route), u, bias, out, activation)
        return out, empty
    y = blast_project(x, v, route.along_t)
    blast_finish(y, u, s, bias, out, route, activation)
    return out, y if keep else empty


def blast_decode(x, s, v, route: BlastRoute):
    """z `[B2, T, R]` at few tokens."""
    if route.stacked:
        y = x.new_empty(v.shape[0], x.shape[0], s.shape[2])
        project_stack(x, v, y)
        return blast_mix(y, s)
    z = x.new_empty(s.shape[0], x.shape[0], s.shape[2])
    decode_project(x, v, s, z)
    return z


def blast_project(x, v, along_t):
    """y `[B1, T, R]` from x `[T, K]` and v `[B1, R, P]`; `along_t`: with the tokens contiguous."""
    tokens, (b1, r, p) = x.shape[0], v.shape
    y = stack_along_t(b1, tokens, r, x) if along_t else x.new_empty(b1, tokens, r)
    torch.bmm(x.view(tokens, b1, p).transpose(0, 1), v.transpose(1, 2), out=y)
    return y


def blast_finish(y, u, s, bias, out, route: BlastRoute, activation=""):
    """out `[T, N]` from y `[B1, T, R]`.

    For S layers that share x: out `[T, S*N]` from y `[B1, T, S*R]`, u `[S*B2, Q, R]`, s `[B2, B1, S*R]` and bias
    `[S*N]`.
    """
    (blocks, q, r), (_, tokens, width) = u.shape, y.shape
    if route.fused:
        blast_expand(y, u, s, bias, out, activation)
    else:
        expand(blast_mix(y, s, width // r), u, bias, out.view(tokens, blocks, q).transpose(0, 1), activation)


def backward(grad, x, u, s, v, y, needs):
    """(dx, du, ds, dv); what `needs` does not ask for is empty, as y may be."""
    need_x, need_u, need_s, need_v = needs
    tokens, (b1, _, p), (b2, q, _) = x.shape[0], v.shape, u.shape
    x = x.view(tokens, b1, p).transpose(0, 1)
    grad = grad.view(tokens, b2, q).transpose(0, 1)
    dx, du, ds, dv = (x.new_empty(0) for _ in range(4))
    if (need_u or need_s) and not y.numel():
        y = torch.bmm(x, v.transpose(1, 2))
    dz = torch.bmm(grad, u) if need_x or need_s or need_v else None
    if need_s:
        z, dy, ds = blast_mix_bwd(dz, y, s)
    else:
        z = blast_mix(y, s) if need_u else None
        dy = blast_mix(dz, s.transpose(0, 1)) if need_x or need_v else None
    if need_u:
        du = torch.bmm(grad.transpose(1, 2), z)
    if need_v:
        dv = torch.bmm(dy.transpose(1, 2), x)
    if need_x:
        dx = x.new_empty(tokens, b1 * p)
        torch.bmm(dy, v, out=dx.view(tokens, b1, p).transpose(0, 1))
    return dx, du, ds, dv
