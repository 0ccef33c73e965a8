"""How a fit is run; no torch, so that a config can be read without it."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class FitOptions:
    """What every fit is told.

    Args:
        rounds: of alternating least squares or block descent at most.
        tolerance: a round that lowers the squared error by less than this fraction is the last.
        damping: added to the diagonal of the input Gram matrix, as a fraction of its mean; see `damping_of`.
        seed: of the starting point.
    """

    rounds: int = 16
    tolerance: float = 3e-3
    damping: float = 1e-4
    seed: int = 0


def damping_of(given: float | None, features: int, rows: int) -> float:
    """How much is added to the diagonal of a Gram matrix `[K, K]` of T rows, as a fraction of its mean: sqrt(K / T).

    So far, up to a factor, the eigenvalues of a Gram matrix of T samples stray from the true ones, relative to their
    mean (Marchenko and Pastur 1967). Directions in which the calibration text shows less than that may be large in
    other text, and a fit that gives them up does worse there. docs/log.md has the measurements.

    Args:
        given: the damping that a user wants, which is returned; None leaves it to the rule.
        features: K.
        rows: T.
    """
    return given if given is not None else min(1.0, math.sqrt(features / max(rows, 1)))
