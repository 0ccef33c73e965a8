"""Monarch: two stacks of products; the second reads what the first wrote with the two block indices swapped."""

from __future__ import annotations

import torch

from hf_blr.ops.triton.block_gemm import block_gemm
from hf_blr.ops.triton.decode import decode_expand, decode_project
from hf_blr.ops.triton.launch import decodes


def monarch_fwd(x, u, v, bias):
    """x `[T, K]`, u `[B2, Q, B1*r]`, v `[B1, B2*r, P]`, bias `[N]` or None -> `[T, N]`."""
    tokens, (b1, _, p), (b2, q, inner) = x.shape[0], v.shape, u.shape
    out = x.new_empty(tokens, b2 * q)
    if tokens == 0:
        return out
    if decodes(tokens, b1, b2):
        z = x.new_empty(b2, tokens, inner)
        decode_project(x, v, None, z)
        decode_expand(z, u, bias, out)
    else:
        y = torch.bmm(x.view(tokens, b1, p).transpose(0, 1), v.transpose(1, 2))
        block_gemm(y, u, out.view(tokens, b2, q).transpose(0, 1), bias=bias, swap=True)
    return out


def monarch_bwd(grad, x, u, v, needs):
    """(dx, du, dv); what `needs` does not ask for is empty."""
    need_x, need_u, need_v = needs
    tokens, (b1, rows, p), (b2, q, _) = x.shape[0], v.shape, u.shape
    r = rows // b2
    x = x.view(tokens, b1, p).transpose(0, 1)
    grad = grad.view(tokens, b2, q).transpose(0, 1)
    dx = du = dv = x.new_empty(0)
    if need_u:
        y = torch.bmm(x, v.transpose(1, 2))
        z = y.view(b1, tokens, b2, r).permute(2, 1, 0, 3).reshape(b2, tokens, b1 * r)
        du = torch.bmm(grad.transpose(1, 2), z)
    if need_x or need_v:
        dz = torch.bmm(grad, u)
        dy = dz.view(b2, tokens, b1, r).permute(2, 1, 0, 3).reshape(b1, tokens, rows)
        if need_v:
            dv = torch.bmm(dy.transpose(1, 2), x)
        if need_x:
            dx = x.new_empty(tokens, b1 * p)
            torch.bmm(dy, v, out=dx.view(tokens, b1, p).transpose(0, 1))
    return dx, du, dv
