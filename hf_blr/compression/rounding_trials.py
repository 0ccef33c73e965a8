"""What rounding adds to the predicted loss.

Of a whole matrix it is known without any fit: what GPTQ does to each number is close to rounding it to the nearest
code, in a metric in which its columns no longer see each other. Factors are tried, on one layer of each kind, and what
they lose is taken as the same multiple, for all layers of the kind, of what errors of the weight's own size would lose.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from hf_blr.compression.allocation import interpolate
from hf_blr.compression.layer_trials import Layer, middles
from hf_blr.compression.shapes import FLOOR, at_ranks, shapes_for
from hf_blr.factorize.bits import coupling_of
from hf_blr.factorize.gram import cholesky, damped
from hf_blr.factorize.metric import regroup
from hf_blr.factorize.row_blocks import felt_of_rows
from hf_blr.formats import Bits
from hf_blr.structures import BLRSpec

#: ratios that trial fits keep: with the bits of the format, most layers keep one between them
TRIAL_RATIOS = 0.3, 0.75


@dataclass(frozen=True)
class Trial:
    """One structure's blocks at one ratio, fitted to one layer.

    truncation: its loss before rounding, over that of low-rank with as many parameters. rounding: {format: what
    rounding adds to the loss, over what errors of the weight's own size would}.
    """

    ratio: float
    truncation: float
    rounding: dict[str, float]


@cache
def storable(spec: BLRSpec, formats: tuple[Bits, ...]) -> list[Bits]:
    """The formats that can store a layer of these sizes and save something by it."""
    return [storage for storage in formats if storage.misfit(spec) is None and storage.waste(spec) is None]


@cache
def candidates(shape: BLRSpec, formats: tuple[Bits, ...]) -> list[BLRSpec]:
    """The structure and blocks at the ranks worth considering that at least one format can store."""
    return [spec for spec in at_ranks(shape, FLOOR, 1.0) if storable(spec, formats)]


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


def trials_of(
    layers: dict[str, Layer], free: dict[str, BLRSpec], formats: tuple[Bits, ...]
) -> dict[str, dict[BLRSpec, list[Trial]]]:
    """{kind of layer: {shape at rank 1: its trials, by rising ratio}}, from each middle layer."""
    found: dict[str, dict[BLRSpec, list[Trial]]] = {}
    for kind, name in middles(layers).items():
        layer = layers[name].tried()
        curve, weight = layer.curve(), layer.weight()
        scale = AfterFeedback.of(layer, weight.device).loss(weight)
        found[kind] = {}
        for shape in shapes_for(free[name], layer.config):
            ranks = in_most_formats(candidates(shape, formats), formats)
            near = [nearest_to(kept, ranks) for kept in TRIAL_RATIOS if ranks]
            found[kind][shape] = [trial_of(layer, spec, curve, scale, formats) for spec in dict.fromkeys(near)]
    return found


def in_most_formats(specs: list[BLRSpec], formats: tuple[Bits, ...]) -> list[BLRSpec]:
    """Of these ranks those that most formats can store: what is tried in fewer says nothing of the others."""
    most = max((len(storable(spec, formats)) for spec in specs), default=0)
    return [spec for spec in specs if len(storable(spec, formats)) == most]


def nearest_to(ratio: float, specs: list[BLRSpec]) -> BLRSpec:
    return min(specs, key=lambda spec: abs(spec.ratio - ratio))


def trial_of(layer: Layer, spec: BLRSpec, curve: Tensor, scale: float, formats: tuple[Bits, ...]) -> Trial:
    """A fit of the layer; all of its trials share `curve`, its `loss_curve`, and `scale`, of its weight."""
    fitted = layer.fit(spec)
    cut = layer.loss(fitted.matrix(spec))
    low_rank = interpolate(curve, spec.equivalent_rank)
    # the refit of other factors can gain what rounding costs; a matrix of zeros loses nothing
    rounding = {
        name: max(total - cut, 1e-30) / scale if scale > 0 else 0.0
        for name, total in layer.rounded_losses(fitted, spec, storable(spec, formats)).items()
    }
    return Trial(spec.ratio, max(cut, 1e-30) / low_rank if low_rank > 0 else 1.0, rounding)
