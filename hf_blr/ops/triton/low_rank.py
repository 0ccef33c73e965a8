"""Low-rank: two plain matrix products, which cuBLAS does best once there are many tokens."""

from __future__ import annotations

import torch.nn.functional as F

from hf_blr.ops.triton.decode import decode_expand, decode_project
from hf_blr.ops.triton.decode_launch import decodes


def low_rank_fwd(x, u, v, bias, keep=False):
    """x `[T, K]` -> `[T, N]`, and y `[T, R]` if asked to keep it.

    u `[N, R]`, v `[R, K]`, bias `[N]` or None.
    """
    tokens, (n, r) = x.shape[0], u.shape
    if tokens == 0 or keep or not decodes(tokens, 1, 1):
        y = F.linear(x, v)
        return F.linear(y, u, bias), y if keep else x.new_empty(0)
    z, out = x.new_empty(1, tokens, r), x.new_empty(tokens, n)
    decode_project(x, v[None], None, z)
    decode_expand(z, u[None], bias, out)
    return out, x.new_empty(0)


def low_rank_bwd(grad, x, u, v, y, needs):
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
