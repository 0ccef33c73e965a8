"""Pivoted low-rank: what low-rank runs, behind a gather of the inputs into pivots and the rest."""

from __future__ import annotations

from hf_blr.ops.dispatch import decodes_low_rank
from hf_blr.ops.triton.columns import gather_columns, scatter_columns
from hf_blr.ops.triton.decode_expand import decode_expand
from hf_blr.ops.triton.decode_one import project_pivoted_one
from hf_blr.ops.triton.decode_project import decode_project
from hf_blr.ops.triton.low_rank import finish


def pivoted_fwd(x, u, c, order, bias, keep=False, activation=""):
    """x `[T, K]` -> `[T, N]`, and y `[T, R]` if asked to keep it.

    u `[N, R]`, c `[R, K - R]`, order `[K]`, bias `[N]` or None.
    """
    tokens, (n, r) = x.shape[0], u.shape
    if not tokens or keep or not decodes_low_rank(tokens):
        y = project(x, c, order)
        return finish(y, u, bias, activation), y if keep else x.new_empty(0)
    if tokens == 1:
        y = x.new_empty(1, r)
        project_pivoted_one(x, c, order, y)
    else:
        y, rest = gather_columns(x, order, r)
        if rest.shape[1]:
            decode_project(rest, c[None], None, y[None], add=True)
    out = x.new_empty(tokens, n)
    decode_expand(y[None], u[None], bias, out, activation)
    return out, x.new_empty(0)


def pivoted_bwd(grad, x, u, c, order, y, needs):
    """(dx, du, dc); what `needs` does not ask for is empty, as y may be."""
    need_x, need_u, need_c = needs
    r = u.shape[1]
    dx, du, dc = (x.new_empty(0) for _ in range(3))
    if need_u:
        du = grad.T @ (y if y.numel() else project(x, c, order))
    if need_x or need_c:
        dy = grad @ u
        if need_x:
            dx = scatter_columns(dy, dy @ c, order)
        if need_c:
            dc = dy.T @ gather_columns(x, order[r:], 0)[1]
    return dx, du, dc


def project(x, c, order):
    """y `[T, R]`, the first stage of any number of tokens."""
    y, rest = gather_columns(x, order, c.shape[0])
    # in place: the pivots are what the product is added to
    return y.addmm_(rest, c.T)
