"""Low-rank factors in bits: v, then the best u for it, and both again."""

from __future__ import annotations

from torch import Tensor

from hf_blr.factorize.bits import ROUNDS, ToRound, refitted, rotation, rows_for
from hf_blr.formats import Codes
from hf_blr.structures.spec import BLRSpec


def rounded(spec: BLRSpec, tensors: dict[str, Tensor], problem: ToRound) -> dict[str, Tensor | Codes]:
    """The codes of u and v, for fitted u `[N, R]` and v `[R, K]` with `balanced` norms."""
    turn, dtype = rotation(spec.rank, problem.seed, tensors["v"]), problem.weight.dtype
    u, v = tensors["u"] @ turn.mT, turn @ tensors["v"]
    for _ in range(ROUNDS):
        v_codes = problem.round(v, problem.gram, problem.behind(u[None]))
        u, gram = refitted(problem.weight, v_codes.numbers(dtype), problem.input_gram)
        u_codes = problem.round(u, gram, problem.coupling)
        u = u_codes.numbers(dtype)
        v = rows_for(u, problem.weight, problem)
    return {"u": u_codes, "v": v_codes}
