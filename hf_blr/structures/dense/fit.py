"""The whole matrix as its own best approximation."""

from __future__ import annotations

from torch import Tensor

from hf_blr.factorize.options import FitOptions
from hf_blr.structures.spec import BLRSpec


def fit(
    weight: Tensor, spec: BLRSpec, gram: Tensor | None, options: FitOptions
) -> tuple[dict[str, Tensor], list[float]]:
    """W `[N, K]` as it is; no rounds, so no losses."""
    return {"w": weight}, []


def finish(spec: BLRSpec, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors as they are: one factor has nobody to balance it with."""
    return tensors
