"""Low-rank in closed form."""

from __future__ import annotations

from torch import Tensor

from hf_blr.factorize.options import FitOptions
from hf_blr.factorize.svd import low_rank_factors
from hf_blr.structures.spec import BLRSpec


def fit(
    weight: Tensor, spec: BLRSpec, gram: Tensor | None, options: FitOptions
) -> tuple[dict[str, Tensor], list[float]]:
    """The best factors of W `[N, K]` for the input Gram matrix `[K, K]`; no rounds, so no losses."""
    u, v = low_rank_factors(weight, spec.rank, gram)
    return {"u": u, "v": v}, []
