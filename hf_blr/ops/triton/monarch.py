"""Monarch: two stacks of products; the second reads what the first wrote with the block indices swapped."""

from __future__ import annotations

import torch

from hf_blr.ops.rules.device import device_of
from hf_blr.ops.rules.monarch import MonarchRoute, monarch_route
from hf_blr.ops.triton.block_gemm import block_gemm, expand
from hf_blr.ops.triton.decode_expand import decode_expand
from hf_blr.ops.triton.decode_places import by_places
from hf_blr.ops.triton.decode_project import decode_project
from hf_blr.ops.triton.decode_stack import project_swapped
from hf_blr.ops.triton.swap import swap_blocks


def forward(x, u, v, bias, keep=False, activation=""):
    """x `[T, K]` -> `[T, N]`, and y `[B1, T, B2*r]` if asked to keep it.

    u `[B2, Q, B1*r]`, v `[B1, B2*r, P]`, in bits up to 32 tokens without `keep`; bias `[N]` or None.
    """
    tokens, (b1, rows, p), (b2, q, _) = x.shape[0], v.shape, u.shape
    out, empty = x.new_empty(tokens, b2 * q), x.new_empty(0)
    if tokens == 0:
        return out, x.new_empty(b1, 0, rows) if keep else empty
    adds = bias is not None or bool(activation)
    route = monarch_route(tokens, (b1, b2), (p, q, rows // b2), device_of(x), adds, keep)
    if route.few:
        decode_expand(monarch_decode(x, v, b2, route), u, bias, out, activation)
        return out, empty
    y = torch.bmm(x.view(tokens, b1, p).transpose(0, 1), v.transpose(1, 2))
    monarch_finish(y, u, bias, out, route, activation)
    return out, y if keep else empty


def monarch_decode(x, v, b2, route: MonarchRoute):
    """z `[B2, T, B1*r]` at few tokens."""
    b1, rows, _ = v.shape
    z = x.new_empty(b2, x.shape[0], b1 * rows // b2)
    if route.stacked and not by_places(v):
        project_swapped(x, v, z)
    else:
        decode_project(x, v, None, z)
    return z


def monarch_finish(y, u, bias, out, route: MonarchRoute, activation=""):
    """out `[T, N]` from y `[B1, T, B2*r]`."""
    (_, tokens, rows), (b2, q, _) = y.shape, u.shape
    blocks = out.view(tokens, b2, q).transpose(0, 1)
    if route.in_place:
        block_gemm(y, u, blocks, bias=bias, swap=True, activation=activation)
    elif route.copied:
        expand(swap_blocks(y, b2), u, bias, blocks, activation)
    else:
        # nothing to swap: what is left is a stack of low-rank layers, whose products cuBLAS does best
        expand(y[0].view(tokens, b2, rows // b2).transpose(0, 1), u, bias, blocks, activation)


def backward(grad, x, u, v, y, needs):
    """(dx, du, dv); what `needs` does not ask for is empty, as y may be."""
    need_x, need_u, need_v = needs
    tokens, (b1, rows, p), (b2, q, _) = x.shape[0], v.shape, u.shape
    r = rows // b2
    x = x.view(tokens, b1, p).transpose(0, 1)
    grad = grad.view(tokens, b2, q).transpose(0, 1)
    dx, du, dv = (x.new_empty(0) for _ in range(3))
    if need_u:
        y = y if y.numel() else torch.bmm(x, v.transpose(1, 2))
        du = torch.bmm(grad.transpose(1, 2), swap_blocks(y, b2))
    if need_x or need_v:
        dy = x.new_empty(b1, tokens, rows)
        # one product for each input block lands where the next stage reads it, and saves a copy
        for j in range(b1):
            torch.bmm(grad, u[:, :, j * r : (j + 1) * r], out=dy[j].view(tokens, b2, r).transpose(0, 1))
        if need_v:
            dv = torch.bmm(dy.transpose(1, 2), x)
        if need_x:
            dx = x.new_empty(tokens, b1 * p)
            torch.bmm(dy, v, out=dx.view(tokens, b1, p).transpose(0, 1))
    return dx, du, dv
