"""Low-rank factors in bits: v, then the best u for it."""

from __future__ import annotations

from torch import Tensor

from hf_blr.factorize.bits import ToRound, refitted, rotation
from hf_blr.formats import Codes
from hf_blr.structures.spec import BLRSpec


def rounded(spec: BLRSpec, tensors: dict[str, Tensor], problem: ToRound) -> dict[str, Tensor | Codes]:
    """The codes of u and v, for fitted u `[N, R]` and v `[R, K]` with `balanced` norms."""
    turn = rotation(spec.rank, problem.seed, tensors["v"])
    behind = problem.behind((tensors["u"] @ turn.mT)[None])
    v = problem.round(turn @ tensors["v"], problem.gram, behind)
    u, gram = refitted(problem.weight, v.numbers(problem.weight.dtype), problem.input_gram)
    return {"u": problem.round(u, gram, problem.coupling), "v": v}
