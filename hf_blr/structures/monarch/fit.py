"""Monarch by block coordinate descent in the metric of the inputs."""

from __future__ import annotations

from functools import reduce

import torch
from torch import Tensor

from hf_blr.factorize.balance import equal_norms
from hf_blr.factorize.gram import cholesky, solve_psd, squared_error
from hf_blr.factorize.options import FitOptions
from hf_blr.factorize.svd import low_rank_factors
from hf_blr.structures.monarch import Monarch
from hf_blr.structures.spec import BLRSpec

#: alternating solves for u and v of one block column before the next column's turn; with two, a round lowers the error
#: as much as the column's truncated SVD would, in a quarter of its time on a GPU, which is slow at eigenvectors
INNER_STEPS = 2


def fit(
    weight: Tensor, spec: Monarch, gram: Tensor | None, options: FitOptions
) -> tuple[dict[str, Tensor], list[float]]:
    """Factors of W `[N, K]` for the input Gram matrix `[K, K]`, and the squared error after each round.

    Starts from the truncated SVD of each block alone. Then a column of blocks at a time: with the other columns fixed,
    v for u and u for v are linear solves in the metric of that column's inputs, so no step raises the error. Features
    of different blocks are correlated; fitting each block alone (the projection of arXiv 2204.00595, which is what
    comes back without a Gram) ignores it and is far worse.
    """
    (b1, b2), (p, q), r = spec.num_blocks, spec.block_shape, spec.rank
    blocks = weight.view(b2, q, b1, p)
    h = None if gram is None else gram.view(b1, p, b1, p).transpose(1, 2)  # [B1, B1, P, P]
    alone = [low_rank_factors(blocks[:, :, j], r, None if h is None else h[j, j]) for j in range(b1)]
    u, v = (torch.stack(column) for column in zip(*alone, strict=True))  # [B1, B2, Q, R], [B1, B2, R, P]
    if gram is None or h is None:
        return packed(u, v, spec), []
    roots = [cholesky(h[j, j]) for j in range(b1)]
    residual = blocks - (u @ v).permute(1, 2, 0, 3)  # [B2, Q, B1, P]
    losses = [squared_error(residual.reshape(weight.shape), gram)]
    for _ in range(options.rounds):
        before = u, v
        u, v = u.clone(), v.clone()
        for j in range(b1):
            # the residual with block column j taken out of the model, times H: only column j of it is needed
            residual[:, :, j] += u[j] @ v[j]
            image = reduce(torch.add, (residual[:, :, k] @ h[k, j] for k in range(b1)))  # [B2, Q, P]
            for _ in range(INNER_STEPS):
                u[j], v[j] = alternate(u[j], image, h[j, j], roots[j])
            residual[:, :, j] -= u[j] @ v[j]
        loss = squared_error(residual.reshape(weight.shape), gram)
        if not loss < losses[-1]:
            # rounding, at the end of what float32 can tell apart
            u, v = before
            break
        losses.append(loss)
        if losses[-1] > (1 - options.tolerance) * losses[-2]:
            break
    return packed(u, v, spec), losses


def alternate(u: Tensor, image: Tensor, h: Tensor, root: Tensor) -> tuple[Tensor, Tensor]:
    """The best v `[B2, R, P]` for u `[B2, Q, R]`, and the best u for that v.

    image `[B2, Q, P]` is the best unconstrained column times its Gram matrix h `[P, P]`, and root that one's Cholesky
    factor.
    """
    b2, _, r = u.shape
    half = solve_psd(u.mT @ u, u.mT @ image)
    v = torch.cholesky_solve(half.reshape(b2 * r, -1).mT, root).mT.view(b2, r, -1)
    return solve_psd(v @ h @ v.mT, v @ image.mT).mT, v


def packed(u: Tensor, v: Tensor, spec: Monarch) -> dict[str, Tensor]:
    """u `[B1, B2, Q, R]`, v `[B1, B2, R, P]` -> the stored shapes `[B2, Q, B1*R]`, `[B1, B2*R, P]`."""
    shapes = spec.sizes()
    return {"u": u.permute(1, 2, 0, 3).reshape(shapes["u"]), "v": v.reshape(shapes["v"])}


def balanced(spec: BLRSpec, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same matrix, with equal norms in u and v for each index of the rank of each pair of blocks."""
    u, v = tensors["u"], tensors["v"]
    (b1, b2), p, r = spec.num_blocks, spec.block_shape[0], spec.rank
    # [B2, Q, B1, R], [B2, B1, R, P]
    columns, rows = equal_norms(u.view(b2, -1, b1, r), v.view(b1, b2, r, p).transpose(0, 1))
    return {"u": columns.reshape(u.shape).contiguous(), "v": rows.transpose(0, 1).reshape(v.shape).contiguous()}
