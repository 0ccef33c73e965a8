"""The whole matrix in bits."""

from __future__ import annotations

from torch import Tensor

from hf_blr.factorize.bits import ToRound
from hf_blr.formats import Codes
from hf_blr.structures.spec import BLRSpec


def rounded(spec: BLRSpec, tensors: dict[str, Tensor], problem: ToRound) -> dict[str, Tensor | Codes]:
    """The codes of w `[N, K]`, in the metrics of inputs and outputs."""
    return {"w": problem.round(tensors["w"], problem.gram, problem.coupling)}
