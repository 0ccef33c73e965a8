"""Pivoted factors in bits: c, then the best u for it, and both again."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_blr.factorize.bits import ROUNDS, ToRound, refitted, rows_for
from hf_blr.factorize.gram import solve_psd
from hf_blr.formats import Codes
from hf_blr.structures.pivoted.reference import pivoted_dense
from hf_blr.structures.spec import BLRSpec


def rounded(spec: BLRSpec, tensors: dict[str, Tensor], problem: ToRound) -> dict[str, Tensor | Codes]:
    """The codes of u and c, for fitted u `[N, R]`, c `[R, K - R]` and order `[K]`.

    c multiplies the features behind the pivots. Nothing can rotate: the pivots' columns must stay an identity.
    """
    order, dtype = tensors["order"].long(), problem.weight.dtype
    pivots, others = order[: spec.rank], order[spec.rank :]
    own = None if problem.gram is None else problem.gram[others][:, others]
    u, c = tensors["u"], tensors["c"]
    codes: Tensor | Codes = c
    for _ in range(ROUNDS if len(others) else 1):
        if len(others):
            codes = problem.round(c, own, problem.behind(u[None]))
            c = codes.numbers(dtype)
        # what u multiplies: the pivots as they are, and c's sums of the others
        rows = pivoted_dense(torch.eye(spec.rank, dtype=dtype, device=c.device), c, order)
        u, gram = refitted(problem.weight, rows, problem.input_gram)
        u_codes = problem.round(u, gram, problem.coupling)
        u = u_codes.numbers(dtype)
        c = c_for(u, problem, pivots, others)
    return {"u": u_codes, "c": codes, "order": tensors["order"]}


def c_for(u: Tensor, problem: ToRound, pivots: Tensor, others: Tensor) -> Tensor:
    """The best c `[R, K - R]` for u. Others make up for what u leaves of the pivots, as far as they go with them."""
    left = problem.weight.clone()
    left[:, pivots] -= u
    gram = problem.input_gram.double()
    # (W - u [1, 0]) H, in the others' columns, over their own H
    seen = left.double() @ gram[:, others]
    return rows_for(u, solve_psd(gram[others][:, others], seen.mT).mT, problem).to(u.dtype)
