"""The dense layer, in a format of fewer bits."""

from __future__ import annotations

from hf_blr.linear import BLRLinear
from hf_blr.structures.dense import Dense


class DenseLinear(BLRLinear):
    """x w^T + bias; see `structures.Dense`."""

    spec_class = Dense

    def initial_std(self) -> dict[str, float]:
        return {"w": (1 / (3 * self.in_features)) ** 0.5}
