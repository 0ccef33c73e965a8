"""The fits of all layers, one after the other, and what the model's config says of them."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

from torch import Tensor, nn
from tqdm.auto import tqdm

from hf_blr.calibration.calls import Batch
from hf_blr.calibration.joint import BlockReport
from hf_blr.calibration.store import Store
from hf_blr.checkpoint.record import forget_quantizer, holders, record_replaced
from hf_blr.compression.journal import Unkept
from hf_blr.compression.problems import problem_groups
from hf_blr.compression.replace import fit_group, move_layer
from hf_blr.compression.report import LayerReport
from hf_blr.compression.shards import Shards
from hf_blr.compression.start import Start
from hf_blr.config import BLRConfig
from hf_blr.experts import expanded, opened
from hf_blr.linear import blr_modules
from hf_blr.plan import Plan
from hf_blr.processes import Processes

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)


def fit_layers(
    model: nn.Module,
    names: list[str],
    start: Start,
    batches: list[Batch],
    config: BLRConfig,
    journal: Unkept,
    store: Store,
    shards: Shards | None,
    processes: Processes,
    progress: bool,
) -> tuple[list[LayerReport], list[BlockReport], list[PreTrainedModel]]:
    """Fits the layers of `start.plan` and puts them in place; their reports, in the model's order, and those of blocks.

    Also the models by which the layers are saved.

    Args:
        names: all targets, also those that stay dense.
    """
    layers: dict[str, LayerReport] = {}
    blocks = journal.block_reports()
    with recorded(model, start.plan, config) as held, opened(model, start.plan):
        # experts are fitted one by one
        origin = expanded(model, names)
        fits = {name: replace(start.plan[of], experts=0) for name, of in origin.items() if of in start.plan}
        groups = problem_groups(
            model, list(origin), fits, batches, start.statistics, config, blocks, journal, store, processes
        )

        def output_gram(name: str) -> Tensor | None:
            return start.output_grams.get(origin[name])

        bar = tqdm(total=len(fits), desc="fitting", unit="layer", disable=not progress)
        # a generator that is left open keeps the model in evaluation mode
        with bar, closing(groups):
            for group in groups:
                for name in (name for name in group if name not in fits):
                    move_layer(model, name, group[name], journal)
                for name, (layer, report) in fit_group(model, fits, group, output_gram, config, journal, processes):
                    model.set_submodule(name, layer)
                    layers[name] = replace(report, choice=start.choices.get(origin[name]))
                    if shards is not None and name in start.plan:
                        shards.add(model, name)
                    bar.set_postfix_str(f"{name} error {report.rel_error:.3f}", refresh=False)
                    bar.update()
    # where the budget left all layers dense, nothing was recorded
    forget_quantizer(model)
    return [layers[name] for name in fits], blocks, held


@contextmanager
def recorded(model: nn.Module, plan: Plan, config: BLRConfig) -> Iterator[list[PreTrainedModel]]:
    """At the end, however it comes, the model's config says what is replaced; before the planned end, a warning too.

    What it yields are then the models of `holders`: they are looked for among all objects.
    """
    held: list[PreTrainedModel] = []
    try:
        yield held
    except BaseException as error:
        replaced = sum(name in plan for name in blr_modules(model))
        if replaced:
            logger.warning(
                "%s stopped the compression when %d of %d layers were replaced. They stay so, and the config of a "
                "transformers model names them: it can be saved and loaded as it is. To start anew, load the "
                "dense model again",
                type(error).__name__,
                replaced,
                len(plan),
            )
        raise
    finally:
        held += holders(model)
        record_replaced(held, config)
