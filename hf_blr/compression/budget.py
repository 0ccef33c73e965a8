"""Structure, blocks and rank for each layer, when all layers share one budget.

The predicted loss of a low-rank matrix is known in closed form at every rank (`allocation.loss_curve`). Another
structure is taken to do as well as low-rank with its parameters; where structures compete, times what fits of one layer
of each kind say.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from hf_blr.calibration.fisher import Statistics
from hf_blr.compression.allocation import Option, allocate, interpolate, loss_curve, predicted_loss
from hf_blr.config import AUTO, BLRConfig
from hf_blr.dense import dense_weight
from hf_blr.experts import layer_named
from hf_blr.factorize import Factors, FitOptions, factorize, in_bits, metric_of, unit_gram
from hf_blr.factorize.bits import ToRound
from hf_blr.factorize.gram import damped
from hf_blr.formats import Bits, Format
from hf_blr.plan import Plan, dense_plan
from hf_blr.structures import BLRSpec, structure_named, structures
from hf_blr.targets import override_for

logger = logging.getLogger(__name__)

#: what the trial fits keep, as fractions of the ratio and of the way from it to one: what blocks gain over low-rank
#: changes with what is kept, and layers keep more or less than the ratio
TRIAL_RATIOS = 0.6, 0.5
#: ranks are multiples of a power of two up to this, which kernels like
LARGEST_STEP = 16

#: so many experts of a tensor stand for all of them
SAMPLED_EXPERTS = 8

#: (kind of layer, structure, blocks)
Kind = tuple[str, str, tuple[int, int]]


@dataclass(frozen=True)
class Budget:
    """What all free layers may cost together.

    amount: in the unit of `cost`. None is the config's ratio of what the dense layers cost.
    cost: (spec, dense) -> what a layer costs as this spec, or as the dense layer that it stands for; parameters if
        None.
    floor, ceiling: smallest and largest ratio that a replaced layer may keep.
    """

    amount: float | None = None
    cost: Callable[[BLRSpec, bool], float] | None = None
    # the prediction is local and says little about ruins
    floor: float = 0.1
    ceiling: float = 1.0

    def of(self, spec: BLRSpec, dense: bool = False) -> float:
        if self.cost is not None:
            return self.cost(spec, dense)
        return spec.dense_parameters if dense else spec.num_parameters


def share_budget(
    model: nn.Module, plan: Plan, statistics: Statistics, config: BLRConfig, budget: Budget | None = None
) -> tuple[Plan, float]:
    """The plan that the predicted loss likes best, and that loss in nats a token; layers best left dense are not in it.

    The experts of a tensor count as one layer, whose loss is theirs together. Layers with a ratio or rank of their own
    in `config.overrides` keep it. Those of which the loss felt nothing keep the config's ratio, since nothing can be
    predicted of them. Neither are in the loss.

    Raises:
        ValueError: if the budget is smaller than the smallest options, or so large that every layer stays dense.
    """
    budget = budget or Budget()
    fixed = {name for name in plan if {"ratio", "rank"} & set(override_for(name, config.overrides))}
    fixed |= {name for name, layer in plan.items() if structure_named(layer.spec.structure).whole}
    fixed |= {name for name in plan if not statistics.felt(name)}
    free = {name: layer.spec for name, layer in plan.items() if name not in fixed}
    if not free:
        return plan, 0.0
    many = {name: plan[name].matrices for name in free}
    # of experts the ranks are shared out, and their structure is the plan's
    shapes = {
        name: [at_rank_one(spec)] if plan[name].experts else shapes_for(spec, config) for name, spec in free.items()
    }
    layers = {name: Layer(model, name, statistics, config) for name in free}
    curves = {name: layer.curve() for name, layer in layers.items()}
    tried = {name: layer for name, layer in layers.items() if not plan[name].experts}
    factors = trial_factors(tried, curves, shapes, ratio_of(config)) if config.structure == AUTO else {}
    options: dict[str, list[Option]] = {}
    for name, spec in free.items():
        options[name] = [Option(None, many[name] * budget.of(spec, dense=True), 0.0)]
        for shape in shapes[name]:
            trials = factors.get((kind_of(name), shape.structure, shape.num_blocks), [])
            storage = storage_of(name, shape, plan, config)
            for candidate in at_ranks(shape, budget.floor, budget.ceiling):
                if storage.misfit(candidate) is not None or storage.waste(candidate) is not None:
                    continue
                loss = factor_at(trials, candidate.ratio) * interpolate(curves[name], candidate.equivalent_rank)
                options[name].append(Option(candidate, many[name] * budget.of(candidate), loss))
    amount = budget.amount
    if amount is None:
        amount = ratio_of(config) * sum(many[name] * budget.of(spec, dense=True) for name, spec in free.items())
    taken = allocate(options, amount)
    dense = [name for name in taken if taken[name].spec is None]
    if dense:
        logger.info("%d layers stay dense, which lowers the predicted loss most: %s", len(dense), ", ".join(dense))
    chosen: Plan = {}
    for name, layer in plan.items():
        override = override_for(name, config.overrides)
        taken_spec = None if name in fixed else taken[name].spec
        if name in fixed:
            chosen[name] = layer
        elif taken_spec is not None:
            chosen[name] = replace(layer, spec=taken_spec, storage=storage_of(name, taken_spec, plan, config))
        elif (whole := dense_plan(layer_named(model, name), config, override)) is not None:
            chosen[name] = whole
    if not chosen:
        raise ValueError(
            f"a budget of {amount:.4g} is best spent on all {len(plan)} layers as they are, dense: nothing would be "
            "compressed; give a smaller one"
        )
    return chosen, sum(option.loss for option in taken.values())


def storage_of(name: str, spec: BLRSpec, plan: Plan, config: BLRConfig) -> Format:
    """The format that a layer's factors would have as this spec; that of experts is the plan's."""
    if plan[name].experts:
        return plan[name].storage
    return config.storage_of(spec.structure, override_for(name, config.overrides))


@dataclass(frozen=True)
class Layer:
    """A dense layer, or the experts of one tensor, with its statistics, on the device where fits run."""

    model: nn.Module
    name: str
    statistics: Statistics
    config: BLRConfig

    def matrices(self) -> tuple[Tensor, Tensor, Tensor]:
        """W `[N, K]`, of experts `[E, N, K]`, H `[K, K]` and the blocks of G."""
        weight = dense_weight(layer_named(self.model, self.name))
        device = self.config.device_for(weight)
        grams = self.statistics.grams[self.name], self.statistics.output_grams[self.name]
        return weight.to(device).float(), grams[0].to(device), grams[1].to(device)

    def shares(self, experts: int) -> dict[int, float]:
        """{expert: its share of the tokens that those experts saw that are looked at}."""
        picked = range(0, experts, -(-experts // SAMPLED_EXPERTS))
        rows = {expert: self.statistics.rows.get(f"{self.name}.{expert}", 0) for expert in picked}
        total = sum(rows.values())
        return {expert: count / total if total else 1 / len(rows) for expert, count in rows.items()}

    @property
    def options(self) -> FitOptions:
        features = len(self.statistics.grams[self.name])
        return self.config.fit_options(features, self.statistics.rows_of(self.name))

    def curve(self) -> Tensor:
        """`loss_curve` of the layer; raises ValueError with its name where the statistics overflowed."""
        weight, gram, output_gram = self.matrices()
        damping, pairs = self.options.damping, self.statistics.pairs(self.name)
        # an expert that sees the share p of S tokens has p G, p H and p S, and makes p of the tensor's loss
        parts = [(1.0, weight)]
        if weight.dim() == 3:
            parts = [(share, weight[expert]) for expert, share in self.shares(len(weight)).items()]
        try:
            curves = [share * loss_curve(part, gram, output_gram, pairs, damping) for share, part in parts]
        except ValueError as error:
            raise ValueError(f"{self.name}: {error}") from None
        return torch.stack(curves).sum(0)

    def trial(self, spec: BLRSpec) -> float:
        """The predicted loss of a fit with all of its rounds: after a quarter of them BLAST looks worse than it is."""
        return self.loss(self.fit(spec).matrix(spec))

    def fit(self, spec: BLRSpec) -> Factors:
        weight, gram, output_gram = self.matrices()
        return factorize(weight, spec, gram, output_gram, self.options)

    def rounded(self, fitted: Factors, spec: BLRSpec, storage: Bits) -> Factors:
        """The fit with codes in the place of factors."""
        weight, gram, output_gram = self.matrices()
        gram = unit_gram(gram, self.options.damping)
        metric = metric_of(spec, output_gram, weight.device)
        return in_bits(fitted, spec, ToRound(weight, gram, metric, storage, self.options.seed))

    def loss(self, matrix: Tensor) -> float:
        """The predicted loss of another matrix `[N, K]` in the place of W."""
        weight, gram, output_gram = self.matrices()
        # as the curve that it is compared with
        gram = damped(gram, self.options.damping)
        return predicted_loss(matrix - weight, gram, output_gram, self.statistics.pairs(self.name))


def trial_factors(
    layers: dict[str, Layer], curves: dict[str, Tensor], shapes: dict[str, list[BLRSpec]], ratio: float
) -> dict[Kind, list[tuple[float, float]]]:
    """{(kind of layer, structure, blocks): [(ratio kept, its loss over low-rank's at equal parameters), ...]}.

    From fits of each kind's middle layer; the ratios rise. Empty for what needs no fit.
    """
    kinds: dict[str, list[str]] = {}
    for name in layers:
        kinds.setdefault(kind_of(name), []).append(name)
    less, more = TRIAL_RATIOS
    factors: dict[Kind, list[tuple[float, float]]] = {}
    for kind, names in kinds.items():
        name = names[len(names) // 2]
        for shape in shapes[name]:
            trials = factors[kind, shape.structure, shape.num_blocks] = []
            closed = structure_named(shape.structure).closed_form
            for kept in () if closed else (less * ratio, ratio + more * (1 - ratio)):
                spec = at_ratio(shape, kept)
                low_rank = interpolate(curves[name], spec.equivalent_rank)
                if low_rank > 0:
                    trials.append((spec.ratio, max(layers[name].trial(spec), 1e-30) / low_rank))
    return factors


def factor_at(trials: list[tuple[float, float]], ratio: float) -> float:
    """The factor for a kept ratio: geometrically between two trials, the nearest beyond them, one without any."""
    if not trials:
        return 1.0
    (low, first), (high, last) = trials[0], trials[-1]
    share = min(max((ratio - low) / (high - low), 0.0), 1.0) if high > low else 0.0
    return first ** (1 - share) * last**share


def ratio_of(config: BLRConfig) -> float:
    if config.ratio is None:
        raise ValueError("layers that share a budget need a ratio of what they cost: set BLRConfig(ratio=...)")
    return config.ratio


def kind_of(name: str) -> str:
    """The name without the number of its block."""
    return re.sub(r"\d+", "*", name)


def at_rank_one(spec: BLRSpec) -> BLRSpec:
    """The structure and blocks of this spec at rank 1."""
    return replace(spec, rank=1)


def shapes_for(spec: BLRSpec, config: BLRConfig) -> list[BLRSpec]:
    """What the layer may become, each at rank 1: its own structure and blocks, or all candidates with "auto".

    Where the blocks of a candidate do not divide a layer, the layer does without it.
    """
    k, n = spec.in_features, spec.out_features
    if config.structure != AUTO:
        return [at_rank_one(spec)]
    shapes = [
        record.spec(k, n, 1, blocks)
        for record in structures().values()
        for blocks in record.auto_blocks
        if k % blocks[0] == 0 and n % blocks[1] == 0
    ]
    return [shape for shape in shapes if shape.num_parameters < shape.dense_parameters]


def at_ranks(shape: BLRSpec, floor: float, ceiling: float) -> list[BLRSpec]:
    """The structure and blocks at the ranks worth considering, from the floor to almost dense."""
    dense, sizes = shape.dense_parameters, (shape.in_features, shape.out_features, shape.num_blocks)
    highest = shape.rank_within(min(dense - 1, int(ceiling * dense)), *sizes)
    step = 1
    while step < LARGEST_STEP and 2 * step <= highest / 16:
        step *= 2
    lowest = max(step, -(-shape.rank_within(int(floor * dense), *sizes) // step) * step)
    return [replace(shape, rank=rank) for rank in range(lowest, highest + 1, step)]


def at_ratio(shape: BLRSpec, ratio: float) -> BLRSpec:
    """The structure and blocks at the rank that the ratio buys, of at least 1."""
    dense = shape.dense_parameters
    within = shape.rank_within(
        min(int(ratio * dense), dense - 1), shape.in_features, shape.out_features, shape.num_blocks
    )
    return replace(shape, rank=max(1, within))
