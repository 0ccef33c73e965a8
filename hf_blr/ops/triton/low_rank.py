"""Low-rank: two plain matrix products, which cuBLAS does best once there are many tokens."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from hf_blr.ops.triton.decode import decode_expand, decode_project
from hf_blr.ops.triton.launch import decodes


def low_rank_fwd(x, u, v, bias):
    """x `[T, K]`, u `[N, R]`, v `[R, K]`, bias `[N]` or None -> `[T, N]`."""
    tokens, (n, r) = x.shape[0], u.shape
    if tokens == 0 or not decodes(tokens, 1, 1):
        return F.linear(F.linear(x, v), u, bias)
    z, out = x.new_empty(1, tokens, r), x.new_empty(tokens, n)
    decode_project(x, v[None], None, z)
    decode_expand(z, u[None], bias, out)
    return out


def low_rank_bwd(grad, x, u, v, needs):
    """(dx, du, dv); what `needs` does not ask for is empty."""
    need_x, need_u, need_v = needs
    dx = du = dv = x.new_empty(0)
    if need_u:
        du = grad.T @ F.linear(x, v)
    if need_x or need_v:
        dy = grad @ u
        dx = dy @ v if need_x else torch.empty_like(dx)
        dv = dy.T @ x if need_v else torch.empty_like(dx[:0])
    return dx, du, dv
