"""Low-rank: two plain matrix products, which cuBLAS does best once there are many tokens."""

from __future__ import annotations

import torch.nn.functional as F

from hf_blr.ops.rules.low_rank import runs_few
from hf_blr.ops.triton.bits import Weights, weights_of
from hf_blr.ops.triton.block_gemm import block_gemm
from hf_blr.ops.triton.decode_expand import decode_expand
from hf_blr.ops.triton.decode_project import decode_project


def forward(x, u, v, bias, keep=False, activation=""):
    """x `[T, K]` -> `[T, N]`, and y `[T, R]` if asked to keep it.

    u `[N, R]`, v `[R, K]`, bias `[N]` or None.
    """
    tokens = x.shape[0]
    if tokens == 0 or not runs_few(tokens, bool(activation), keep):
        y = F.linear(x, v)
        return finish(y, u, bias, activation), y if keep else x.new_empty(0)
    return decode(x, weights_of(u), weights_of(v), bias, activation), x.new_empty(0)


def decode(x, u: Weights, v: Weights, bias, activation=""):
    """`[T, N]` at few tokens."""
    tokens, (n, r) = x.shape[0], u.shape
    z, out = x.new_empty(1, tokens, r), x.new_empty(tokens, n)
    decode_project(x, v.stacked(), None, z)
    decode_expand(z, u.stacked(), bias, out, activation)
    return out


def finish(y, u, bias, activation=""):
    """`[T, N]` from y `[T, R]` at many tokens."""
    if not activation or not len(y):
        return F.linear(y, u, bias)
    out = y.new_empty(len(y), len(u))
    block_gemm(y[None], u[None], out[None], bias=bias, activation=activation)
    return out


def backward(grad, x, u, v, y, needs):
    """(dx, du, dv); what `needs` does not ask for is empty, as y may be."""
    need_x, need_u, need_v = needs
    dx, du, dv = (x.new_empty(0) for _ in range(3))
    if need_u:
        du = grad.T @ (y if y.numel() else F.linear(x, v))
    if need_x or need_v:
        dy = grad @ u
        if need_x:
            dx = dy @ v
        if need_v:
            dv = dy.T @ x
    return dx, du, dv
