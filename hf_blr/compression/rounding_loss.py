"""What rounding a whole matrix adds to the predicted loss, and what can be stored in which format.

Of a whole matrix it is known without any fit: what GPTQ does to each number is close to rounding it to the nearest
code, in a metric in which its columns no longer see each other. Factors are tried; see `rounding_trials`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from hf_blr.compression.layer_trials import Layer
from hf_blr.compression.shapes import FLOOR, at_ranks
from hf_blr.factorize.bits import coupling_of
from hf_blr.factorize.gram import cholesky, damped
from hf_blr.factorize.metric import regroup
from hf_blr.factorize.row_blocks import felt_of_rows
from hf_blr.formats import Bits
from hf_blr.structures import BLRSpec


@cache
def storable(spec: BLRSpec, formats: tuple[Bits, ...]) -> list[Bits]:
    """The formats that can store a layer of these sizes and save something by it."""
    return [storage for storage in formats if storage.misfit(spec) is None and storage.waste(spec) is None]


@cache
def candidates(shape: BLRSpec, formats: tuple[Bits, ...], multiple: int | None) -> list[BLRSpec]:
    """The structure and blocks at the ranks worth considering that at least one format can store; see `at_ranks`."""
    return [spec for spec in at_ranks(shape, FLOOR, 1.0, multiple) if storable(spec, formats)]


@dataclass(frozen=True)
class AfterFeedback:
    """What independent errors in the numbers of W `[N, K]` cost the loss when feedback has done what it can.

    With H = L D L^T, L unit triangular, D is what is left of each column's error when the later columns have made up
    for it; `felt_of_rows` says the same of rows. rows `[N]`, columns `[K]`, float64.
    """

    rows: Tensor
    columns: Tensor

    @classmethod
    def of(cls, layer: Layer, device: torch.device) -> AfterFeedback:
        gram, output_gram = layer.grams(device)
        root = cholesky(damped(gram, layer.options.damping).double().flip(-1, -2))
        coupling = coupling_of(output_gram, 1, layer.options.damping, len(gram))
        whole = regroup(output_gram, 1)[0]
        felt = whole.double().diagonal() if coupling is None else felt_of_rows(whole, coupling[0])
        return cls(felt / (2 * layer.statistics.pairs(layer.name)), root.diagonal().flip(0).square())

    def loss(self, errors: Tensor) -> float:
        """Of errors `[N, K]`, in nats a token."""
        return (self.rows @ errors.double().square() @ self.columns).item()

    def of_whole(self, weight: Tensor, storage: Bits) -> float:
        """Of a whole matrix in this format, within a few percent: as if rounded to the nearest codes."""
        return self.loss(storage.nearest(weight).numbers(weight.dtype) - weight)
