"""Low-rank in closed form: truncated SVD in the metric of the inputs."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_blr.factorize.gram import cholesky


def low_rank_factors(weight: Tensor, rank: int, gram: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The u `[..., N, R]`, v `[..., R, K]` that minimise ||(W - u v) X||, for a (batch of) W `[..., N, K]`.

    gram `[..., K, K]` is X^T X; without one the norm is Frobenius'. The best u spans the leading left singular vectors
    U of W X, and the best v for it is U^T W, whatever X is: no inverse of the Gram or of its root is needed, so a
    singular one does no harm. (Same optimum as the whitened SVD of SVD-LLM, arXiv 2403.07378.)
    The columns of u are orthonormal.
    """
    n, k = weight.shape[-2:]
    # squaring W X halves the digits; float64 keeps enough of them
    wide = weight.double()
    if n <= k:
        # in float64 the Gram matrix is larger than all else, and nobody's once it is multiplied
        right = wide if gram is None else wide @ gram.double()
        basis = leading_eigenvectors(right @ wide.mT, rank)[1]
    else:
        image = wide if gram is None else wide @ cholesky(gram.double())
        values, vectors = leading_eigenvectors(image.mT @ image, rank)
        sigma = values.clamp_min(0).sqrt()
        # directions that the inputs never excite have no left vector
        inverse = torch.where(sigma > 1e-7 * sigma[..., :1], 1 / sigma, torch.zeros_like(sigma))
        basis = image @ vectors * inverse.unsqueeze(-2)
    return basis.to(weight.dtype), (basis.mT @ wide).to(weight.dtype)


def leading_eigenvectors(matrix: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` largest eigenvalues `[..., R]`, falling, and their vectors `[..., n, R]`; zeros where n < count."""
    values, vectors = torch.linalg.eigh(matrix)
    values, vectors = values.flip(-1)[..., :count], vectors.flip(-1)[..., :count]
    missing = count - values.shape[-1]
    if missing > 0:
        values = torch.nn.functional.pad(values, (0, missing))
        vectors = torch.nn.functional.pad(vectors, (0, missing))
    return values, vectors
