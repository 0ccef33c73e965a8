"""Gram matrices as the fits need them: damped, positive definite, and solved against without a crash."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

#: of a direction of conjugate gradients, as a share of what the preconditioner makes believe
LEAST_CURVATURE = 1e-4


def damped(gram: Tensor, damping: float) -> Tensor:
    """gram `[K, K]` -> the same, symmetric, with `damping` times its mean diagonal added to the diagonal.

    Features that never fire leave a zero row; the damping gives them a small cost instead of none, so that a
    rank-deficient Gram pulls its null space towards the plain weight.

    Raises:
        ValueError: if the matrix is not square, holds NaN or infinity, or is all zero.
    """
    if gram.dim() != 2 or gram.shape[0] != gram.shape[1]:
        raise ValueError(f"a Gram matrix is square, [K, K]; got shape {tuple(gram.shape)}")
    mean = gram.diagonal().mean()
    if not torch.isfinite(gram).all():
        raise ValueError(
            "the Gram matrix of the inputs holds NaN or infinity: the calibration run overflowed; "
            "use bfloat16 or float32"
        )
    if mean <= 0:
        raise ValueError("the Gram matrix of the inputs is zero: no calibration input reached this layer")
    gram = (gram + gram.mT) / 2
    gram.diagonal().add_(damping * mean)
    return gram


def cholesky(matrix: Tensor) -> Tensor:
    """Lower Cholesky factor of a (batch of) positive semi-definite matrices `[..., n, n]`.

    Rounding can make such a matrix indefinite; the members that fail get a growing multiple of their mean diagonal
    until they factor. A member that is all zero gets a small multiple of the identity.
    """
    factor, failed = torch.linalg.cholesky_ex(matrix)
    mean = matrix.diagonal(dim1=-2, dim2=-1).mean(-1)
    scale = torch.where(mean > 0, mean, torch.ones_like(mean))
    jitter = torch.finfo(matrix.dtype).eps
    lifted = torch.zeros_like(failed, dtype=torch.bool)
    while failed.any():
        jitter *= 10
        # a member that has been lifted must stay so while others still fail
        lifted |= failed > 0
        if jitter > 1e3:
            raise ValueError("a normal matrix of the fit holds NaN or infinity; are the weight and its Gram finite?")
        shift = torch.where(lifted, jitter * scale, torch.zeros_like(scale))
        shifted = matrix.clone()
        shifted.diagonal(dim1=-2, dim2=-1).add_(shift.unsqueeze(-1))
        factor, failed = torch.linalg.cholesky_ex(shifted)
    return factor


def cholesky_in_place(make: Callable[[], Tensor]) -> Tensor:
    """`cholesky` of one matrix `[n, n]` in the memory of what `make` returns, which is made again if it must be lifted.

    make: returns a new tensor each time, exactly symmetric.
    """
    # column by column, as the solvers want it: the same numbers
    matrix = make().mT
    failed = torch.empty((), dtype=torch.int32, device=matrix.device)
    torch.linalg.cholesky_ex(matrix, out=(matrix, failed))
    return cholesky(make()) if failed else matrix


def solve_psd(matrix: Tensor, rhs: Tensor) -> Tensor:
    """X with matrix X = rhs, for a (batch of) positive semi-definite `[..., n, n]` and rhs `[..., n, m]`."""
    return solve_root(cholesky(matrix), rhs)


def solve_root(root: Tensor, rhs: Tensor) -> Tensor:
    """X with L L^T X = rhs, for a (batch of) L `[..., n, n]` and rhs `[..., n, m]`.

    On a GPU `cholesky_solve` copies L, and goes through a batch one by one.
    """
    half = torch.linalg.solve_triangular(root, rhs, upper=False)
    return torch.linalg.solve_triangular(root.mT, half, upper=True)


def inverse_root(matrix: Tensor, damping: float = 0.0) -> Tensor:
    """Lower triangular L^-1 with matrix^-1 = L^-T L^-1, for a (batch of) positive semi-definite `[..., n, n]`.

    damping: the multiple of each matrix' mean diagonal that is added to its diagonal first.
    """
    eye = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    mean = matrix.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    root = cholesky(matrix + damping * mean * eye)
    return torch.linalg.solve_triangular(root, eye.expand_as(root), upper=False)


def conjugate_gradients(
    product: Callable[[Tensor], Tensor],
    rhs: Tensor,
    start: Tensor,
    precondition: Callable[[Tensor], Tensor],
    steps: int,
    dims: tuple[int, ...],
) -> Tensor:
    """x near the solution of A x = rhs, never further from it than `start` in the norm of A, up to rounding.

    A fixed number of steps, since to look at the residual would stop a GPU. A system stands still from where nothing
    but rounding is left, or its direction is one that A does not see: going on would blow x up.

    Args:
        product: x -> A x, positive semi-definite.
        rhs, start: of one shape.
        precondition: x -> M x, where M is close to the inverse of A.
        dims: the axes of one system; along the others lie systems that have nothing to do with each other.
    """
    eps = torch.finfo(rhs.dtype).eps

    def inner(a: Tensor, b: Tensor) -> Tensor:
        return (a * b).sum(dims, keepdim=True)

    rounding = 100 * eps**2 * inner(rhs, precondition(rhs))
    # of A, which sees what it has made itself; products of it err by so much of a direction's length
    image = product(rhs)
    least = 10 * eps * (inner(image, image) / inner(rhs, rhs)).sqrt().nan_to_num(0.0)
    x, residual = start, rhs - product(start)
    direction, slope = torch.zeros_like(rhs), rhs.new_tensor(torch.inf)
    # of the direction, in the norm of M^-1
    size = torch.zeros_like(rounding)
    going = torch.ones_like(rounding, dtype=torch.bool)
    for _ in range(steps):
        step = precondition(residual)
        slope, before = inner(residual, step), slope
        growth = torch.where(going, slope / before, 0.0)
        size = slope + growth**2 * size
        direction = step + growth * direction
        image = product(direction)
        curvature = inner(direction, image)
        seen = (curvature > LEAST_CURVATURE * size) & (curvature > least * inner(direction, direction))
        going = going & (slope > rounding) & seen
        length = torch.where(going, slope / curvature, 0.0)
        x, residual = x + length * direction, residual - length * image
    return x


def squared_error(residual: Tensor, gram: Tensor) -> float:
    """||residual X||^2 for residual `[N, K]` and gram = X^T X."""
    return ((residual @ gram).double() * residual.double()).sum().item()
