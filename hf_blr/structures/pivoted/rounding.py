"""Pivoted factors in bits: c, then the best u for it."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_blr.factorize.bits import ToRound, refitted
from hf_blr.formats import Codes
from hf_blr.structures.spec import BLRSpec


def rounded(spec: BLRSpec, tensors: dict[str, Tensor], problem: ToRound) -> dict[str, Tensor | Codes]:
    """The codes of u and c, for fitted u `[N, R]`, c `[R, K - R]` and order `[K]`.

    c multiplies the features behind the pivots. Nothing can rotate: the pivots' columns must stay an identity.
    """
    order = tensors["order"].long()
    pivots, others = order.split([spec.rank, spec.in_features - spec.rank])
    rows = torch.zeros_like(problem.weight[:1]).repeat(spec.rank, 1)
    rows[:, pivots] = torch.eye(spec.rank, dtype=rows.dtype, device=rows.device)
    c: Tensor | Codes = tensors["c"]
    if len(others):
        codes = problem.round(tensors["c"], None if problem.gram is None else problem.gram[others][:, others])
        c, rows[:, others] = codes, codes.numbers(rows.dtype)
    u, gram = refitted(problem.weight, rows, problem.input_gram)
    return {"u": problem.round(u, gram), "c": c, "order": tensors["order"]}
