"""The pivoted layer."""

from __future__ import annotations

from torch import Tensor

from hf_blr.linear import BLRLinear
from hf_blr.structures.pivoted import Pivoted


class PivotedLinear(BLRLinear):
    """Low-rank with some inputs passed as they are; see `structures.Pivoted`."""

    spec_class = Pivoted
    c: Tensor
    order: Tensor

    def initial_std(self) -> dict[str, float]:
        # what enters u has variance 2: an input, and c's sum of the others
        return {"u": (1 / (6 * self.spec.rank)) ** 0.5, "c": max(1, self.c.shape[1]) ** -0.5}
