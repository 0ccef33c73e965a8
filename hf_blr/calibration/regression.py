"""The matrix that does best on a layer's new inputs: sums over rows, and the solution."""

from __future__ import annotations

from torch import Tensor

from hf_blr.calibration.padding import real_rows
from hf_blr.calibration.precision import tf32
from hf_blr.calibration.residual import add_product, wide_parts
from hf_blr.factorize.gram import cholesky_in_place, damped, solve_root
from hf_blr.processes import ALONE, Processes


class Regression:
    """What the inputs of layers that share them sum up to, X `[T, K]` in the dense model and X~ in the compressed one.

    Args:
        share: how much of the way a layer goes from W to what gives back its own outputs.
        processes: that share the rows, and the rows of W.

    Attributes:
        gram: X~^T X~ `[K, K]`; None before the first rows.
        rows: T.
    """

    def __init__(self, share: float, processes: Processes = ALONE):
        self.share, self.processes, self.rows = share, processes, 0
        self.gram: Tensor | None = None
        self.moved: Tensor | None = None
        self.pull: Tensor | None = None

    def add(self, x: Tensor, reached: Tensor, real: Tensor | None = None, gap: Tensor | None = None) -> None:
        """Adds a batch.

        Args:
            x, reached: `[..., K]`, of X and of X~.
            real: the positions that count; None where all do.
            gap: the residual stream's difference `[..., N]`, for a layer that writes to it.
        """
        rows = [real_rows(each, real) for each in (x, reached, gap) if each is not None]
        self.rows += len(rows[0])
        with tf32():
            for wanted, own, *lost in wide_parts(*rows):
                self.gram = add_product(self.gram, own, own)
                # not X X~^T - X~ X~^T, whose difference would keep the rounding of both
                self.moved = add_product(self.moved, wanted - own, own)
                for part in lost:
                    self.pull = add_product(self.pull, part, own)

    def gather(self) -> None:
        """Makes of the sums those of all processes."""
        for total in (self.gram, self.moved, self.pull):
            if total is not None:
                self.processes.add(total)
        self.rows = sum(self.processes.gathered(self.rows))

    def targets(self, weights: dict[str, Tensor], damping: float) -> dict[str, Tensor]:
        """{layer: W* = W + (share W (X - X~) X~^T + D X~^T) (X~ X~^T)^-1}, with D the residual stream's difference.

        The sums are used up by it.

        Args:
            weights: {layer: this process' share of the rows of W `[N, K]`, in float64}, of a layer alone if it writes.
            damping: of the Gram matrix, as a fraction of its mean diagonal.

        Returns:
            The same rows, in float32.

        Raises:
            ValueError: if nothing was added, or numbers that are not finite.
        """
        gram = self.gram
        if gram is None or self.moved is None:
            raise ValueError("no row was added to regress on")
        images = {name: self.share * (weight @ self.moved.double()) for name, weight in weights.items()}
        # in float64 these matrices are the largest that a calibration holds
        self.moved = None
        if self.pull is not None:
            for image in images.values():
                image += self.pull[self.processes.share(len(self.pull))].double()
        root = cholesky_in_place(lambda: damped(gram, damping).double())
        return {name: (weights[name] + solve_root(root, image.mT).mT).float() for name, image in images.items()}
