"""The matrix that does best on a layer's new inputs: sums over rows, and the solution."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_blr.calibration.precision import tf32
from hf_blr.calibration.residual import add
from hf_blr.factorize.gram import cholesky, damped


class Regression:
    """What the inputs of layers that share them sum up to, X `[T, K]` in the dense model and X~ in the compressed one.

    Args:
        share: how much of the way a layer goes from W to what gives back its own outputs.

    Attributes:
        gram: X~^T X~ `[K, K]`; None before the first rows.
        rows: T.
    """

    def __init__(self, share: float):
        self.share, self.rows = share, 0
        self.gram: Tensor | None = None
        self.moved: Tensor | None = None
        self.pull: Tensor | None = None

    def add(self, x: Tensor, reached: Tensor, gap: Tensor | None = None) -> None:
        """Adds rows.

        Args:
            x, reached: of X and of X~.
            gap: the residual stream's difference `[rows, N]`, for a layer that writes to it.
        """
        self.rows += len(reached)
        with tf32():
            self.gram = add(self.gram, reached.mT @ reached)
            # not X X~^T - X~ X~^T, whose difference would keep the rounding of both
            self.moved = add(self.moved, (x - reached).mT @ reached)
            if gap is not None:
                self.pull = add(self.pull, gap.mT @ reached)

    def target(self, weight: Tensor, damping: float) -> Tensor:
        """W* = W + (share W (X - X~) X~^T + D X~^T) (X~ X~^T)^-1, with D the residual stream's difference.

        Args:
            weight: W `[N, K]`.
            damping: of the Gram matrix, as a fraction of its mean diagonal.

        Raises:
            ValueError: if nothing was added, or numbers that are not finite.
        """
        if self.gram is None or self.moved is None:
            raise ValueError("no row was added to regress on")
        wide = weight.double()
        image = self.share * (wide @ self.moved.double())
        if self.pull is not None:
            image += self.pull.double()
        root = cholesky(damped(self.gram, damping).double())
        return (wide + torch.cholesky_solve(image.mT, root).mT).float()
