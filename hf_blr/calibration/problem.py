"""What is to be fitted in the place of one layer."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from hf_blr.calibration.grams import Grams


@dataclass(frozen=True)
class Problem:
    """One layer to fit.

    gram: of its inputs, `[K, K]`. target: the matrix to approximate, if not its weight. rows: of the Gram matrix' X.
    """

    gram: Tensor | None
    target: Tensor | None = None
    rows: int = 0


def problems_of(grams: Grams) -> dict[str, Problem]:
    """Those of layers that are to come close to their weights on these inputs."""
    return {name: Problem(gram, rows=grams.rows[name]) for name, gram in grams.items()}
