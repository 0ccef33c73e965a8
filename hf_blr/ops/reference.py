"""The structures in plain PyTorch: the oracle of the kernels, and what runs where no kernel does.

Any leading shape, any float dtype, any device; differentiable by autograd. Sizes are those of `hf_blr.structures`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def low_rank_linear(x: Tensor, u: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """x `[..., K]`, u `[N, R]`, v `[R, K]` -> `[..., N]`."""
    return F.linear(F.linear(x, v), u, bias)


def monarch_linear(x: Tensor, u: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """x `[..., K]`, u `[B2, Q, B1*R]`, v `[B1, B2*R, P]` -> `[..., N]`. arXiv 2204.00595."""
    y = _project(x, v)
    (b1, _, tokens), (b2, _, width) = y.shape, u.shape
    # [B1, B2, R, T] -> [B2, B1*R, T]: the two block indices swap places
    z = y.view(b1, b2, width // b1, tokens).transpose(0, 1).reshape(b2, width, tokens)
    return _expand(z, u, bias, x.shape[:-1])


def blast_linear(x: Tensor, u: Tensor, s: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """x `[..., K]`, u `[B2, Q, R]`, s `[B2, B1, R]`, v `[B1, R, P]` -> `[..., N]`. arXiv 2410.21262."""
    # one [B2, B1] x [B1, T] product for each r
    z = torch.bmm(s.permute(2, 0, 1), _project(x, v).transpose(0, 1))
    return _expand(z.transpose(0, 1), u, bias, x.shape[:-1])


def pivoted_linear(x: Tensor, u: Tensor, c: Tensor, order: Tensor, bias: Tensor | None = None) -> Tensor:
    """x `[..., K]`, u `[N, R]`, c `[R, K - R]`, order `[K]` -> `[..., N]`. PIFA, PMLR 267, pivots among the inputs."""
    r = c.shape[0]
    rows = x.reshape(-1, x.shape[-1]).index_select(-1, order)
    y = torch.addmm(rows[:, :r], rows[:, r:], c.mT)
    return torch.nn.functional.linear(y, u, bias).view(*x.shape[:-1], u.shape[0])


def low_rank_dense(u: Tensor, v: Tensor) -> Tensor:
    """The matrix `[N, K]` that `low_rank_linear` multiplies by."""
    return u @ v


def pivoted_dense(u: Tensor, c: Tensor, order: Tensor) -> Tensor:
    """The matrix `[N, K]` that `pivoted_linear` multiplies by."""
    return torch.cat([u, u @ c], dim=1).index_select(1, order.argsort())


def monarch_dense(u: Tensor, v: Tensor) -> Tensor:
    """The matrix `[N, K]` that `monarch_linear` multiplies by."""
    (b2, q, _), (b1, _, p) = u.shape, v.shape
    blocks = torch.einsum("iqjr,jirp->iqjp", u.view(b2, q, b1, -1), v.view(b1, b2, -1, p))
    return blocks.reshape(b2 * q, b1 * p)


def blast_dense(u: Tensor, s: Tensor, v: Tensor) -> Tensor:
    """The matrix `[N, K]` that `blast_linear` multiplies by."""
    (b2, q, _), (b1, r, p) = u.shape, v.shape
    # s goes into v first: [B2, R, B1*P]
    rows = torch.einsum("ijr,jrp->irjp", s, v).reshape(b2, r, b1 * p)
    return torch.bmm(u, rows).view(b2 * q, b1 * p)


#: {structure: its layer}
LINEAR = {"low_rank": low_rank_linear, "pivoted": pivoted_linear, "monarch": monarch_linear, "blast": blast_linear}
#: {structure: its dense matrix from its factors, by name}
DENSE = {"low_rank": low_rank_dense, "pivoted": pivoted_dense, "monarch": monarch_dense, "blast": blast_dense}


def dense_linear(x: Tensor, structure: str, bias: Tensor | None = None, **factors: Tensor) -> Tensor:
    """x `[..., K]` by the dense matrix of the factors, which is built in their own dtype whatever autocast says."""
    with torch.autocast(x.device.type, enabled=False):
        weight = DENSE[structure](**factors)
    return torch.nn.functional.linear(x, weight, bias)


def _project(x: Tensor, v: Tensor) -> Tensor:
    """x `[..., K]`, v `[B1, R, P]` -> y `[B1, R, T]`.

    Tokens last: every product that follows then has a contiguous axis, and none is copied before it is multiplied. On
    a CPU that makes a training step of BLAST twice as fast as with the rank last.
    """
    b1, _, p = v.shape
    # -1 counts no tokens, too, as well as a symbolic number of them, of which a `torch.Size` has no product
    return torch.bmm(v, x.reshape(-1, b1, p).permute(1, 2, 0))


def _expand(z: Tensor, u: Tensor, bias: Tensor | None, lead: torch.Size) -> Tensor:
    """z `[B2, R, T]`, u `[B2, Q, R]` -> `[*lead, N]`."""
    b2, q, _ = u.shape
    out = torch.bmm(u, z).permute(2, 0, 1).reshape(*lead, b2 * q)
    return out if bias is None else out + bias
