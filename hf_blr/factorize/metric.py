"""The output side of a fit's metric: errors count by how much the loss feels them."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_blr.factorize.gram import cholesky

#: added to the diagonal of G, as a fraction of its mean. It is estimated from one sampled label a token, with fewer
#: directions well known than there are in H, so it takes far more
OUTPUT_DAMPING = 1e-2


class OutputMetric:
    """W -> L^T W and back, for G = L L^T block diagonal in the output blocks.

    Minimising ||L^T (W - W') X|| is the plain problem for L^T W, and L^-T goes into u: inside an output block every
    structure's u is free, so the structure is kept. What G says between output blocks is dropped.

    Args:
        gram: G = sum of g g^T over the gradients g of the loss by the layer's outputs, as diagonal blocks `[M, n, n]`
            with M n = N.
        blocks: output blocks B2 of the structure to fit.
    """

    def __init__(self, gram: Tensor, blocks: int):
        diagonal = regroup(gram.double(), blocks)
        mean = diagonal.diagonal(dim1=-2, dim2=-1).mean()
        if not torch.isfinite(mean):
            raise ValueError("the loss' gradients hold NaN or infinity; use bfloat16 or float32 for the calibration")
        # no gradient at all: nothing to tell outputs apart
        diagonal = diagonal / mean if mean > 0 else torch.zeros_like(diagonal)
        diagonal.diagonal(dim1=-2, dim2=-1).add_(OUTPUT_DAMPING if mean > 0 else 1.0)
        self.root = cholesky(diagonal)  # [B2, Q, Q]

    def whiten(self, weight: Tensor) -> Tensor:
        """L^T W, for W with N rows in its first two (or one) dimensions."""
        blocks = weight.double().reshape(self.root.shape[0], self.root.shape[1], -1)
        return (self.root.mT @ blocks).view(weight.shape).to(weight.dtype)

    def restore(self, u: Tensor) -> Tensor:
        """L^-T u, for u with N rows in its first two (or one) dimensions."""
        blocks = u.double().reshape(self.root.shape[0], self.root.shape[1], -1)
        return torch.linalg.solve_triangular(self.root.mT, blocks, upper=True).reshape(u.shape).to(u.dtype)


def regroup(gram: Tensor, blocks: int) -> Tensor:
    """Diagonal blocks `[M, n, n]` of a matrix -> its diagonal blocks `[blocks, N / blocks, N / blocks]`.

    What the wider blocks know and the given ones do not is zero.
    """
    m, n, _ = gram.shape
    size = m * n // blocks
    if blocks % m == 0:
        parts = gram.view(m, blocks // m, size, blocks // m, size)
        return parts.diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2).reshape(blocks, size, size)
    if m % blocks == 0:
        return torch.stack([torch.block_diag(*group) for group in gram.split(m // blocks)])
    diagonal = gram.diagonal(dim1=-2, dim2=-1).reshape(blocks, size)
    return torch.diag_embed(diagonal)


def metric_blocks(out_features: int, largest: int = 2048) -> int:
    """How many diagonal blocks of at most `largest` rows the matrix G `[N, N]` is kept in; they bound its memory."""
    return next(m for m in range(1, out_features + 1) if out_features % m == 0 and out_features // m <= largest)
