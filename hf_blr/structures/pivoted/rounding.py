"""Pivoted factors in bits: c, then the best u for it."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_blr.factorize.bits import ToRound, refitted
from hf_blr.formats import Codes
from hf_blr.structures.pivoted.reference import pivoted_dense
from hf_blr.structures.spec import BLRSpec


def rounded(spec: BLRSpec, tensors: dict[str, Tensor], problem: ToRound) -> dict[str, Tensor | Codes]:
    """The codes of u and c, for fitted u `[N, R]`, c `[R, K - R]` and order `[K]`.

    c multiplies the features behind the pivots. Nothing can rotate: the pivots' columns must stay an identity.
    """
    order = tensors["order"].long()
    others = order[spec.rank :]
    c: Tensor | Codes = tensors["c"]
    numbers = tensors["c"]
    if len(others):
        own = None if problem.gram is None else problem.gram[others][:, others]
        c = problem.round(numbers, own, problem.behind(tensors["u"][None]))
        numbers = c.numbers(problem.weight.dtype)
    # what u multiplies: the pivots as they are, and c's sums of the others
    rows = pivoted_dense(torch.eye(spec.rank, dtype=numbers.dtype, device=numbers.device), numbers, order)
    u, gram = refitted(problem.weight, rows, problem.input_gram)
    return {"u": problem.round(u, gram, problem.coupling), "c": c, "order": tensors["order"]}
