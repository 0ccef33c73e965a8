"""What to fit next: the weights alone, dense Gram matrices, or regressions on the model compressed so far."""

from __future__ import annotations

import logging
from collections.abc import Generator, Sequence
from contextlib import closing

from torch import Tensor, nn

from hf_blr.calibration.aim import Aim
from hf_blr.calibration.blockwise import iterate_grams, whole_model_grams
from hf_blr.calibration.calls import Batch
from hf_blr.calibration.fisher import Statistics
from hf_blr.calibration.grams import Grams
from hf_blr.calibration.joint import BlockReport, refine_block
from hf_blr.calibration.problem import Problem, problems_of
from hf_blr.calibration.progress import Progress
from hf_blr.calibration.routed import pooled
from hf_blr.calibration.sequential import SequentialChain
from hf_blr.calibration.store import Store
from hf_blr.config import BLRConfig
from hf_blr.experts import lies_in_experts
from hf_blr.modes import evaluating
from hf_blr.plan import Plan
from hf_blr.processes import Processes

logger = logging.getLogger(__name__)


def problem_groups(
    model: nn.Module,
    names: list[str],
    plan: Plan,
    batches: list[Batch],
    statistics: Statistics | None,
    config: BLRConfig,
    blocks: list[BlockReport],
    progress: Progress,
    store: Store,
    processes: Processes,
) -> Generator[dict[str, Problem], None, None]:
    """{layer: Problem} for the layers to fit next, in the order in which they become ready.

    The caller must have replaced them when it asks for more. Finished layers come too, to be put in place, and their
    problems may be empty.

    Args:
        names: all target layers. Those that are not in the plan come too where there is something for them to make up
            for: a problem with a target.
        blocks: gets the reports of refined blocks.
        progress: what is finished, and who is told of more.
        store: where hidden states are kept.
        processes: that share the text.
    """
    reached = [name for name in names if statistics is None or label_of(model, name) not in statistics.unreached]
    waiting = dict.fromkeys(plan)
    wanted = {*plan, *progress.layers}
    if batches:
        groups = calibrated_groups(model, reached, plan, batches, config, blocks, progress, store, processes)
    else:
        groups = groups_of_statistics(model, reached, plan, statistics)
    with closing(groups):
        for group in groups:
            # inputs that are all zero say as little as none, and what the layer puts out does not hang on its weight
            told = {name: problem for name, problem in group.items() if problem.gram is None or problem.gram.any()}
            for name in told:
                waiting.pop(name, None)
            yield {name: problem for name, problem in told.items() if name in wanted or problem.target is not None}
    if waiting:
        logger.warning(
            "no calibration input reached %s, or zeros alone; fitted to the weights alone", ", ".join(waiting)
        )
        yield dict.fromkeys(waiting, Problem(None))


def label_of(model: nn.Module, name: str) -> str:
    """The name under which statistics know a layer: of an expert, that of its tensor."""
    return name.rpartition(".")[0] if lies_in_experts(model, name) else name


def groups_of_statistics(
    model: nn.Module, reached: list[str], plan: Plan, statistics: Statistics | None
) -> Generator[dict[str, Problem], None, None]:
    """All layers at once, in the dense model's inputs, or in none where there are no statistics."""
    fitted = {name: label_of(model, name) for name in reached if name in plan}
    if statistics is None:
        yield dict.fromkeys(fitted, Problem(None))
    else:
        grams = statistics.grams
        yield {name: Problem(grams[label], rows=statistics.rows_of(label)) for name, label in fitted.items()}


def calibrated_groups(
    model: nn.Module,
    names: list[str],
    plan: Plan,
    batches: list[Batch],
    config: BLRConfig,
    blocks: list[BlockReport],
    progress: Progress,
    store: Store,
    processes: Processes,
) -> Generator[dict[str, Problem], None, None]:
    """Sequentially if the config wants that and as far as the model can, else from the dense model's inputs alone."""

    def refine(
        name: str, block: nn.Module, aim: Aim, entered: Sequence[Tensor], wanted: Sequence[Tensor]
    ) -> BlockReport | None:
        report = refine_block(name, block, aim, entered, wanted, config.block_steps, config.seed)
        if report is not None:
            blocks.append(report)
        return report

    if config.sequential:
        with evaluating(model):
            chain = SequentialChain.trace(model, names, batches, progress, store, processes)
            apart = [name for name in chain.apart if name in plan]
            if apart:
                reasons = "; ".join(dict.fromkeys(chain.apart[name] for name in apart))
                logger.warning("%s: %s are fitted on the dense model's inputs", reasons, ", ".join(apart))
                if progress.has_all(apart):
                    yield progress.problems(apart)
                else:
                    yield with_pooled(model, whole_model_grams(model, apart, batches, processes=processes), apart)
            yield from chain.problems(config.damping, refine if config.block_steps else None)
            return
    fitted = [name for name in names if name in plan]
    with closing(iterate_grams(model, fitted, batches, progress, store, processes)) as blockwise:
        left = progress.problems(fitted)
        for grams in blockwise:
            problems = with_pooled(model, grams, fitted)
            left = {name: problem for name, problem in left.items() if name not in problems}
            yield problems
    # as late as this, since blocks behind them were to see what the dense ones put out
    yield left


def with_pooled(model: nn.Module, grams: Grams, names: list[str]) -> dict[str, Problem]:
    """The problems of these layers, and of all experts among `names` whose tensor has some expert here."""
    tensors = {name.rpartition(".")[0] for name in grams}
    experts = [name for name in names if name.rpartition(".")[0] in tensors and lies_in_experts(model, name)]
    return pooled(problems_of(grams), experts)
