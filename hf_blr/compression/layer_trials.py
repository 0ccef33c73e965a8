"""What a fit of one layer says of all of its kind: the loss of blocks over that of low-rank at equal parameters."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from operator import mul

import torch
from torch import Tensor, nn

from hf_blr.calibration.fisher import Statistics
from hf_blr.compression.allocation import interpolate, loss_curve, predicted_loss
from hf_blr.compression.shapes import at_ratio
from hf_blr.config import BLRConfig
from hf_blr.dense import at_hand, dense_weight, feature_sizes
from hf_blr.experts import layer_named
from hf_blr.factorize import Factors, FitOptions, factorize, metric_of, unit_gram, with_codes
from hf_blr.factorize.bits import ToRound, coupling_of
from hf_blr.factorize.gram import damped
from hf_blr.factorize.roots import Roots
from hf_blr.formats import Bits
from hf_blr.structures import BLRSpec, structure_named

#: what the trial fits keep, as fractions of the ratio and of the way from it to one: what blocks gain over low-rank
#: changes with what is kept, and layers keep more or less than the ratio
TRIAL_RATIOS = 0.6, 0.5

#: so many experts of a tensor stand for all of them
SAMPLED_EXPERTS = 8

#: what stands alone between the points of a name
NUMBERS = r"(?<![^.])\d+(?![^.])"
#: (kind of layer, structure, blocks)
Kind = tuple[str, str, tuple[int, int]]


@dataclass(frozen=True)
class Layer:
    """A dense layer, or the experts of one tensor, with its statistics, on the device where fits run.

    expert: the one that this is about; None: a linear layer, or all experts of the tensor together.
    """

    model: nn.Module
    name: str
    statistics: Statistics
    config: BLRConfig
    expert: int | None = None

    @property
    def kind(self) -> str:
        """Its name without the number of its block, and its sizes: of layers of one kind, one is tried for all."""
        k, n = feature_sizes(layer_named(self.model, self.name))
        # `fc1` and `fc2` are two kinds
        return f"{re.sub(NUMBERS, '*', self.name)} {k} x {n}"

    @property
    def leading(self) -> tuple[int, ...]:
        """The axes of the dense weight before `[N, K]`: those of E experts, or none."""
        return tuple(dense_weight(layer_named(self.model, self.name)).shape[:-2])

    def parts(self) -> list[tuple[float, Layer]]:
        """[(share of the loss, layer of one matrix)]: the layer itself, or the experts that stand for all.

        An expert that sees the share p of S tokens has p G, p H and p S, and makes p of the tensor's loss.
        """
        if self.expert is not None or not self.leading:
            return [(1.0, self)]
        picked = range(0, self.leading[0], -(-self.leading[0] // SAMPLED_EXPERTS))
        rows = {expert: self.statistics.rows.get(f"{self.name}.{expert}", 0) for expert in picked}
        total = sum(rows.values())
        return [
            (count / total if total else 1 / len(rows), replace(self, expert=expert)) for expert, count in rows.items()
        ]

    def tried(self) -> Layer:
        """The layer of one matrix on which trials are made: of experts, the one that the loss feels most."""
        return max(self.parts(), key=lambda part: part[0])[1]

    def weight(self) -> Tensor:
        """W `[N, K]`, of the expert where there are several."""
        layer = layer_named(self.model, self.name)
        with at_hand(layer):
            weight = dense_weight(layer)
            weight = weight if self.expert is None else weight[self.expert]
            return weight.to(self.config.device_for(weight)).float()

    def grams(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """H `[K, K]` and the blocks of G on this device; of experts, of all together."""
        return self.statistics.grams[self.name].to(device), self.statistics.output_grams[self.name].to(device)

    def matrices(self) -> tuple[Tensor, Tensor, Tensor]:
        """W `[N, K]`, H `[K, K]` and the blocks of G."""
        weight = self.weight()
        return weight, *self.grams(weight.device)

    @property
    def options(self) -> FitOptions:
        # not off H, which may have to be read from a file for it
        features, _ = feature_sizes(layer_named(self.model, self.name))
        return self.config.fit_options(features, self.statistics.rows_of(self.name))

    def curve(self) -> list[float]:
        """`loss_curve` of the layer, of experts the sum of theirs; as numbers, since budgets ask thousands of times.

        Raises:
            ValueError: with the layer's name, where the statistics overflowed.
        """
        damping, curves = self.options.damping, []
        for share, part in self.parts():
            weight = part.weight()
            # statistics are those of one dense model, of which each config is fitted to a copy
            key = self.name, part.expert, damping, *mark_of(weight)
            if key not in self.statistics.known:
                pairs = self.statistics.pairs(self.name)
                try:
                    found = loss_curve(weight, *part.grams(weight.device), pairs, damping)
                except ValueError as error:
                    raise ValueError(f"{self.name}: {error}") from None
                self.statistics.known[key] = found.tolist()
            curves.append((share, self.statistics.known[key]))
        shares, known = zip(*curves, strict=True)
        return [sum(map(mul, shares, losses)) for losses in zip(*known, strict=True)]

    def trial(self, spec: BLRSpec) -> float:
        """The predicted loss of a fit with all of its rounds: after a quarter of them BLAST looks worse than it is."""
        return self.loss(self.fit(spec).matrix(spec))

    def fit(self, spec: BLRSpec) -> Factors:
        weight, gram, output_gram = self.matrices()
        return factorize(weight, spec, gram, output_gram, self.options)

    def rounded_losses(self, fitted: Factors, spec: BLRSpec, formats: Sequence[Bits]) -> dict[str, float]:
        """{format: the predicted loss of the fit with codes in the place of factors}."""
        weight, gram, output_gram = self.matrices()
        damping, metric = self.options.damping, metric_of(spec, output_gram)
        coupling = coupling_of(output_gram, spec.num_blocks[1], damping, spec.in_features)
        gram, roots = unit_gram(gram, damping), Roots()
        found = {}
        for storage in formats:
            problem = ToRound(weight, gram, metric, coupling, storage, self.options.seed, roots)
            found[storage.name] = self.loss(with_codes(fitted, spec, problem).matrix(spec))
        return found

    def loss(self, matrix: Tensor) -> float:
        """The predicted loss of another matrix `[N, K]` in the place of W."""
        weight, gram, output_gram = self.matrices()
        # as the curve that it is compared with
        gram = damped(gram, self.options.damping)
        return predicted_loss(matrix - weight, gram, output_gram, self.statistics.pairs(self.name))


def mark_of(weight: Tensor) -> tuple[float, float]:
    """Numbers that tell matrices `[N, K]` apart."""
    wide = weight.double()
    rows, columns = (torch.arange(size, dtype=wide.dtype, device=wide.device) for size in wide.shape)
    first, second = torch.stack([rows @ wide @ columns, wide.square().sum()]).tolist()
    return first, second


def middles(layers: dict[str, Layer]) -> dict[str, str]:
    """{kind: the middle one of its layers}, which stands for all of them where one must be tried."""
    kinds: dict[str, list[str]] = {}
    for name, layer in layers.items():
        kinds.setdefault(layer.kind, []).append(name)
    return {kind: names[len(names) // 2] for kind, names in kinds.items()}


def trial_factors(
    layers: dict[str, Layer], shapes: dict[str, list[BLRSpec]], ratio: float
) -> dict[Kind, list[tuple[float, float]]]:
    """{(kind of layer, structure, blocks): [(ratio kept, its loss over low-rank's at equal parameters), ...]}.

    From fits of each kind's middle layer; the ratios rise. Empty for what needs no fit.
    """
    less, more = TRIAL_RATIOS
    factors: dict[Kind, list[tuple[float, float]]] = {}
    for kind, name in middles(layers).items():
        layer = layers[name].tried()
        curve = layer.curve()
        for shape in shapes[name]:
            trials = factors[kind, shape.structure, shape.num_blocks] = []
            closed = structure_named(shape.structure).closed_form
            for kept in () if closed else (less * ratio, ratio + more * (1 - ratio)):
                spec = at_ratio(shape, kept)
                low_rank = interpolate(curve, spec.equivalent_rank)
                if low_rank > 0:
                    trials.append((spec.ratio, max(layer.trial(spec), 1e-30) / low_rank))
    return factors


def factor_at(trials: list[tuple[float, float]], ratio: float) -> float:
    """The factor for a kept ratio: geometrically between two trials, the nearest beyond them, one without any."""
    if not trials:
        return 1.0
    (low, first), (high, last) = trials[0], trials[-1]
    share = min(max((ratio - low) / (high - low), 0.0), 1.0) if high > low else 0.0
    return first ** (1 - share) * last**share
