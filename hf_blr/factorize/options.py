"""How a fit is run; no torch, so that a config can be read without it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class FitOptions:
    """What every fit is told.

    Args:
        rounds: of alternating least squares or block descent at most.
        tolerance: a round that lowers the squared error by less than this fraction is the last.
        damping: added to the diagonal of the input Gram matrix, as a fraction of its mean.
        seed: of the starting point.
    """

    rounds: int = 16
    tolerance: float = 3e-3
    damping: float = 1e-4
    seed: int = 0
