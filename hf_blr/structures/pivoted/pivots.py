"""A low-rank pair of factors, stored without the numbers that change nothing."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_blr.structures.spec import BLRSpec

#: pivots are exchanged until no number of c is larger. Large ones are ill-conditioned: what bfloat16 rounds off c then
#: counts more than what it rounds off u
LARGEST = 2.0


def finish(spec: BLRSpec, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """`pivoted` of the low-rank factors "u" and "v"."""
    return pivoted(tensors["u"], tensors["v"])


def pivoted(u: Tensor, v: Tensor) -> dict[str, Tensor]:
    """The same matrix u v as {"u" `[N, R]`, "c" `[R, K - R]`, "order" `[K]` int32}; see `structures.Pivoted`.

    The first pivots are those of an LU decomposition of an orthonormal basis of v's rows; then each exchange of a pivot
    for another feature enlarges the determinant of the pivots' block (maxvol, Goreinov et al. 2010). Pivots and the
    other features each come in ascending order, so that gathers read neighbours. Float64 inside.

    Args:
        u, v: `[N, R]` and `[R, K]`, R at most K.
    """
    r, k = v.shape
    # a row of zeros, where the inputs have fewer directions than the rank, needs a direction of its own all the same
    basis, triangle = torch.linalg.qr(v.double().mT)  # [K, R], v = triangle^T basis^T
    order = torch.arange(k, device=v.device)
    for i, pivot in enumerate(torch.linalg.lu_factor(basis)[1].tolist()):
        # LAPACK's row exchanges, counted from one
        order[[i, pivot - 1]] = order[[pivot - 1, i]]
    c = torch.linalg.solve(basis[order[:r]].mT, basis[order[r:]].mT)
    for _ in range(r if r < k else 0):
        row, column = divmod(int(c.abs().argmax()), k - r)
        size = c[row, column].clone()
        if size.abs() <= LARGEST:
            break
        # pivot `row` and feature `column` change places
        left, above = c[:, column].clone(), c[row].clone()
        left[row] -= 1
        above[column] += 1
        c -= torch.outer(left, above) / size
        order[[row, r + column]] = order[[r + column, row]]
    rows, columns = order[:r].argsort(), order[r:].argsort()
    c, order = c[rows][:, columns], torch.cat([order[:r][rows], order[r:][columns]])
    # u' = u times the pivots' block of v
    pivots = triangle.mT @ basis[order[:r]].mT
    return {"u": (u.double() @ pivots).to(u.dtype), "c": c.to(v.dtype), "order": order.int()}


def random_indices(spec: BLRSpec, device: torch.device | str) -> dict[str, Tensor]:
    """An order `[K]` of the kind that fits give: pivots anywhere, and both parts ascending."""
    order = torch.randperm(spec.in_features, device=device).int()
    return {"order": torch.cat([order[: spec.rank].sort().values, order[spec.rank :].sort().values])}
