"""What must be known before the first fit: what each layer becomes, and how its outputs weigh."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from torch import Tensor, nn

from hf_blr.calibration.batches import statistics_of
from hf_blr.calibration.calls import Batch
from hf_blr.calibration.fisher import Statistics
from hf_blr.calibration.store import Store, only
from hf_blr.compression.allocation import Choice
from hf_blr.compression.bits import share_bits
from hf_blr.compression.budget import share_budget
from hf_blr.config import AUTO, BLRConfig
from hf_blr.plan import Plan
from hf_blr.processes import Processes

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Start:
    """Where the fits begin.

    plan: what is replaced. predicted_loss: of a plan that shares a budget. choices: of one that shares bits.
    statistics: what fits still need of those of the dense model; None where there are none.
    """

    plan: Plan
    predicted_loss: float | None = None
    choices: dict[str, Choice] = field(default_factory=dict)
    statistics: Statistics | None = None

    @property
    def output_grams(self) -> Mapping[str, Tensor]:
        """{layer: blocks of G} of those whose outputs are weighed."""
        return {} if self.statistics is None else self.statistics.output_grams


def start_of(
    model: nn.Module,
    plan: Plan,
    batches: list[Batch],
    statistics: Statistics | None,
    config: BLRConfig,
    store: Store,
    processes: Processes,
) -> Start:
    """Runs the batches through the dense model and back, if nobody has yet, and shares out the budget.

    Args:
        store: where what is seen there is kept.
        processes: that share the work; all of them get the same.
    """
    if statistics is None and batches and config.fisher:
        logger.info("running %d batches through the dense model and back, to see what its loss feels", len(batches))
        statistics = statistics_of(model, plan, batches, config, store, processes)
    weighed = statistics is not None and config.fisher and bool(statistics.output_grams)
    if config.structure == AUTO and not (weighed or config.layers):
        raise ValueError(
            'structure="auto" needs calibration data and outputs that depend on the layers; name a structure'
        )
    if statistics is None:
        return Start(plan)
    predicted = None
    choices: dict[str, Choice] = {}
    if weighed and config.shares_budget and not config.layers:
        plan, predicted = share_budget(model, plan, statistics, config, processes=processes)
    if config.bits_per_weight is not None and not config.layers:
        plan, predicted, choices = share_bits(model, plan, statistics, config)
    # trials round otherwise on another GPU
    plan, predicted, choices = processes.gathered((plan, predicted, choices))[0]
    needed = replace(
        statistics,
        # fits to text sum the Gram matrices of their own
        grams={} if batches else statistics.grams,
        output_grams=only(statistics.output_grams, plan if weighed else ()),
    )
    return Start(plan, predicted, choices, needed)
