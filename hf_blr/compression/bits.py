"""Structure, rank and format of each layer, when all layers share one budget of stored bits.

What an option is predicted to cost the loss is a sum: what the rank cuts off, as in `budget`, and what rounding adds,
as in `rounding_loss` and `rounding_trials`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import nn

from hf_blr.calibration.fisher import Statistics
from hf_blr.compression.ahead import compile_rounding
from hf_blr.compression.allocation import (
    Choice,
    Option,
    allocate,
    allocate_both,
    choice_of,
    loss_of,
    within,
)
from hf_blr.compression.layer_trials import Layer
from hf_blr.compression.rounding_loss import AfterFeedback, storable
from hf_blr.compression.rounding_trials import Trial, outcomes, trials_of
from hf_blr.config import BLRConfig
from hf_blr.dense import stored_weight
from hf_blr.experts import layer_named
from hf_blr.formats import FORMATS, PLAIN, Bits, Format, takes_groups
from hf_blr.plan import LayerPlan, Plan
from hf_blr.structures import BLRSpec
from hf_blr.targets import override_for

#: from so many bits of a code on one scale serves a row as well as one for each group, in fewer bits and at any rank
ROWS_SUFFICE = 8


@dataclass(frozen=True)
class TimeLimit:
    """What all layers may take together.

    seconds: of one forward. predict: (name, spec, format, whether it is the dense layer as it was) -> seconds of a
        layer, of all experts where there are several.
    """

    seconds: float
    predict: Callable[[str, BLRSpec, Format, bool], float]

    def predicted(self, name: str, option: Option, whole: BLRSpec) -> Option:
        """The option with its time, for a layer whose whole matrix has this spec."""
        return replace(option, seconds=self.predict(name, option.spec or whole, option.storage, option.spec is None))


def share_bits(
    model: nn.Module, plan: Plan, statistics: Statistics, config: BLRConfig, time: TimeLimit | None = None
) -> tuple[Plan, float, dict[str, Choice]]:
    """The plan of the least predicted loss within `config.bits_per_weight`, that loss, and why; see `Choice`.

    No plan that keeps all layers whole in one format is predicted to do better. The experts of a tensor count as one
    layer, whose bits and loss are theirs together. Layers that `config.overrides` name keep what they say. Those of
    which the loss felt nothing keep their matrix, in the widest format that the budget allows each layer. Neither are
    in the loss; their bits are counted. Layers that are best left as they are, are not in the plan. With a `time` all
    layers together are predicted to take no longer.

    Raises:
        ValueError: if the smallest options store more than the budget, or no plan within it is found that takes no
            longer than the time.
    """
    assert config.bits_per_weight is not None
    formats = formats_of(config)
    fixed = {name: layer for name, layer in plan.items() if override_for(name, config.overrides)}
    for name in plan:
        if name not in fixed and not statistics.felt(name):
            fixed[name] = widest(plan[name], formats, config.bits_per_weight)
    free = {name: plan[name].spec for name in plan if name not in fixed}
    dtypes = {name: stored_weight(layer_named(model, name)).dtype for name in plan}
    sizes = {name: layer.matrices * layer.spec.dense_parameters for name, layer in plan.items()}
    numbers = sum(sizes.values())
    rest = config.bits_per_weight * numbers
    rest -= sum(8 * layer.num_bytes(dtypes[name]) for name, layer in fixed.items())
    layers = {name: Layer(model, name, statistics, config) for name in free}
    if free:
        compile_rounding(formats, config.device_for(stored_weight(layer_named(model, next(iter(free))))))
    # who wants time too may take blocks that bits alone would never pay for
    trials = trials_of(layers, free, formats, hopeless_too=time is not None)
    options = {
        name: options_of(layers[name], spec, trials[layers[name].kind], formats, dtypes[name], config)
        for name, spec in free.items()
    }
    least = sum(min(option.cost for option in of_layer) for of_layer in options.values())
    if least > rest:
        raise ValueError(
            f"bits_per_weight={config.bits_per_weight:g} is less than the smallest options take together: give at "
            f"least {config.bits_per_weight + (least - rest) / numbers:.3f}, or a larger group_size"
        )
    if time is None:
        plans = [allocate(options, rest), *uniform(options, rest)]
    else:
        options = {
            name: [time.predicted(name, option, free[name]) for option in of_layer]
            for name, of_layer in options.items()
        }
        spent = (time.predict(name, layer.spec, layer.storage, False) for name, layer in fixed.items())
        seconds = time.seconds - sum(spent)
        plans = within_both(options, rest, seconds)
    taken = min(plans, key=loss_of)
    chosen = dict(fixed)
    for name, option in taken.items():
        if option.spec is not None:
            chosen[name] = replace(plan[name], spec=option.spec, storage=option.storage)
    reasons = {
        name: choice_of(option, options[name], sizes[name], hopeless(trials[layers[name].kind]))
        for name, option in taken.items()
    }
    return {name: chosen[name] for name in plan if name in chosen}, loss_of(taken), reasons


def within_both(options: dict[str, list[Option]], budget: float, seconds: float) -> list[dict[str, Option]]:
    """Plans within the bits and the seconds. Raises ValueError if there is none."""
    both = allocate_both(options, budget, seconds) if seconds > 0 else None
    plans = [plan for plan in uniform(options, budget) if within(plan, budget, seconds)]
    plans += [] if both is None else [both]
    if not plans:
        fastest = sum(min(option.seconds for option in of_layer) for of_layer in options.values())
        raise ValueError(
            f"no plan was found within bits_per_weight and {max(seconds, 0) * 1e3:.4g} ms for the layers to choose: "
            f"their fastest options take {fastest * 1e3:.4g} ms, whatever they store; give more time or more bits"
        )
    return plans


def formats_of(config: BLRConfig) -> tuple[Bits, ...]:
    """Those of fewer bits, with the config's groups where these gain anything."""
    group_size = None if config.group_size == -1 else config.group_size
    found = []
    for storage in FORMATS.values():
        if isinstance(storage, Bits):
            grouped = takes_groups(storage.name) and storage.bits < ROWS_SUFFICE
            found.append(replace(storage, group_size=group_size) if grouped else storage)
    return tuple(found)


def widest(layer: LayerPlan, formats: tuple[Bits, ...], bits_per_weight: float) -> LayerPlan:
    """The whole layer in the format that stores most within the budget, or in the smallest if none is within."""
    most = bits_per_weight * layer.spec.dense_parameters / 8
    sizes = {storage: storage.num_bytes(layer.spec, torch.bfloat16) for storage in storable(layer.spec, formats)}
    within = {storage: size for storage, size in sizes.items() if size <= most}
    return replace(layer, storage=max(within, key=sizes.__getitem__) if within else min(sizes, key=sizes.__getitem__))


def options_of(
    layer: Layer,
    whole: BLRSpec,
    trials: dict[BLRSpec, list[Trial]],
    formats: tuple[Bits, ...],
    dtype: torch.dtype,
    config: BLRConfig,
) -> list[Option]:
    """All that a layer can become, with what it stores in bits and its predicted loss; of experts, all together."""
    curve, leading = layer.curve(), layer.leading
    weights = [(share, part.weight()) for share, part in layer.parts()]
    feedback = AfterFeedback.of(layer, weights[0][1].device)
    scale = sum(share * feedback.loss(weight) for share, weight in weights)
    found = [Option(None, 8.0 * PLAIN.num_bytes(whole, dtype, leading), 0.0)]
    for kept in storable(whole, formats):
        loss = sum(share * feedback.of_whole(weight, kept) for share, weight in weights)
        found.append(Option(whole, 8.0 * kept.num_bytes(whole, dtype, leading), loss, kept))
    for shape, tries in trials.items():
        if not all(trial.hopeless for trial in tries):
            for spec, storage, loss in outcomes(shape, tries, curve, scale, formats, config.rank_multiple):
                found.append(Option(spec, 8.0 * storage.num_bytes(spec, dtype, leading), loss, storage))
    return found


def hopeless(trials: dict[BLRSpec, list[Trial]]) -> dict[str, float]:
    """{structure and blocks that were not tried further: its loss over low-rank's at equal parameters}."""
    return {
        " ".join(Option(shape, 0.0, 0.0).kind[:-1]): tries[0].truncation
        for shape, tries in trials.items()
        if tries and all(trial.hopeless for trial in tries)
    }


def uniform(options: dict[str, list[Option]], budget: float) -> list[dict[str, Option]]:
    """The plans within the budget that keep every layer whole in one format."""
    plans = []
    for kind in {option.kind for of_layer in options.values() for option in of_layer if option.whole}:
        plan = {name: option for name, layer in options.items() for option in layer if option.kind == kind}
        if len(plan) == len(options) and sum(option.cost for option in plan.values()) <= budget:
            plans.append(plan)
    return plans
