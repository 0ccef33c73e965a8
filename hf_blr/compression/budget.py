"""Structure, blocks and rank for each layer, when all layers share one budget.

The predicted loss of a low-rank matrix is known in closed form at every rank (`allocation.loss_curve`). Another
structure is taken to do as well as low-rank with its parameters; where structures compete, times what fits of one layer
of each kind say.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import nn

from hf_blr.calibration.fisher import Statistics
from hf_blr.compression.allocation import Option, allocate, interpolate
from hf_blr.compression.layer_trials import Layer, factor_at, trial_factors
from hf_blr.compression.shapes import FLOOR, at_ranks, fit_cost, ratio_of, shapes_for
from hf_blr.config import AUTO, BLRConfig
from hf_blr.experts import layer_named
from hf_blr.formats import Format
from hf_blr.plan import Plan, dense_plan
from hf_blr.processes import ALONE, Processes
from hf_blr.structures import BLRSpec, structure_named
from hf_blr.targets import override_for

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Budget:
    """What all free layers may cost together.

    amount: in the unit of `cost`. None is the config's ratio of what the dense layers cost.
    cost: (name, spec, dense) -> what a layer costs as this spec, or as the dense layer that it stands for, of experts
        all together; parameters if None.
    floor, ceiling: smallest and largest ratio that a replaced layer may keep.
    """

    amount: float | None = None
    cost: Callable[[str, BLRSpec, bool], float] | None = None
    floor: float = FLOOR
    ceiling: float = 1.0

    def of(self, name: str, spec: BLRSpec, matrices: int, dense: bool = False) -> float:
        if self.cost is not None:
            return self.cost(name, spec, dense)
        return matrices * (spec.dense_parameters if dense else spec.num_parameters)


def share_budget(
    model: nn.Module,
    plan: Plan,
    statistics: Statistics,
    config: BLRConfig,
    budget: Budget | None = None,
    processes: Processes = ALONE,
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
    shapes = {name: shapes_for(spec, config) for name, spec in free.items()}
    layers = {name: Layer(model, name, statistics, config) for name in free}
    curves = curves_of(layers, free, processes)
    factors = trial_factors(layers, shapes, ratio_of(config)) if config.structure == AUTO else {}
    options: dict[str, list[Option]] = {}
    for name, spec in free.items():
        options[name] = [Option(None, budget.of(name, spec, many[name], dense=True), 0.0)]
        for shape in shapes[name]:
            trials = factors.get((layers[name].kind, shape.structure, shape.num_blocks), [])
            storage = storage_of(name, shape, config)
            for candidate in at_ranks(shape, budget.floor, budget.ceiling, config.rank_multiple):
                if storage.misfit(candidate) is not None or storage.waste(candidate) is not None:
                    continue
                loss = factor_at(trials, candidate.ratio) * interpolate(curves[name], candidate.equivalent_rank)
                options[name].append(Option(candidate, budget.of(name, candidate, many[name]), loss))
    amount = budget.amount
    if amount is None:
        amount = ratio_of(config) * sum(options[name][0].cost for name in free)
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
            chosen[name] = replace(layer, spec=taken_spec, storage=storage_of(name, taken_spec, config))
        elif (whole := dense_plan(layer_named(model, name), config, override)) is not None:
            chosen[name] = whole
    if not chosen:
        raise ValueError(
            f"a budget of {amount:.4g} is best spent on all {len(plan)} layers as they are, dense: nothing would be "
            "compressed; give a smaller one"
        )
    return chosen, sum(option.loss for option in taken.values())


def curves_of(layers: dict[str, Layer], specs: dict[str, BLRSpec], processes: Processes) -> dict[str, list[float]]:
    """{layer: its `loss_curve`}; each is computed by one of the processes, which all hold the statistics."""
    owners = processes.owners([fit_cost(specs[name]) for name in layers])
    own = {name: layers[name] for name, owner in zip(layers, owners, strict=True) if owner == processes.rank}
    said = processes.gathered({name: layer.curve() for name, layer in own.items()})
    found = {name: curve for each in said for name, curve in each.items()}
    return {name: found[name] for name in layers}


def storage_of(name: str, spec: BLRSpec, config: BLRConfig) -> Format:
    """The format that a layer's factors would have as this spec."""
    return config.storage_of(spec.structure, override_for(name, config.overrides))
