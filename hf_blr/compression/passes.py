"""Where fits begin when the whole model is fitted more than once.

Fisher matrices of the dense model say what the loss feels of a small change. At half the parameters nothing is small:
what the compressed layers behind a layer no longer see, it need not keep. So another pass takes its matrices, and its
share of the budget, from the model that the pass before left.
"""

from __future__ import annotations

import copy
import logging

from torch import nn

from hf_blr.calibration.batches import statistics_of
from hf_blr.calibration.calls import Batch
from hf_blr.calibration.fisher import Statistics
from hf_blr.calibration.store import Store
from hf_blr.compression.fits import fit_layers
from hf_blr.compression.journal import Unkept
from hf_blr.compression.start import Start, start_of
from hf_blr.config import BLRConfig
from hf_blr.config.checks import check_without_text
from hf_blr.experts import multiply_out
from hf_blr.linear import blr_modules
from hf_blr.plan import Plan
from hf_blr.processes import Processes

logger = logging.getLogger(__name__)

#: a pass that only shows where the next one begins reads one batch in so many
SPARED = 4


def start_of_passes(
    model: nn.Module,
    plan: Plan,
    names: list[str],
    batches: list[Batch],
    statistics: Statistics | None,
    config: BLRConfig,
    store: Store,
    processes: Processes,
    progress: bool,
) -> Start:
    """`start_of`, and for each further pass of `config.passes` again on a copy of the model that is compressed by it.

    Args:
        names: all targets, also those that stay dense.
        progress: show progress bars.

    Raises:
        ValueError: if the config asks for what takes text, and there is none, or the model is offloaded.
    """
    if not batches:
        check_without_text(config, weighed=statistics is not None)
    start = start_of(model, plan, batches, statistics, config, store, processes)
    if config.passes == 1:
        return start
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ValueError(f"passes={config.passes} copy the model, which is partly offloaded: set passes=1")
    first = copy.copy(config)
    first.block_steps = 0
    for number in range(1, config.passes):
        logger.info("pass %d of %d", number, config.passes)
        trial = copy.deepcopy(model)
        fit_layers(trial, names, start, batches[::SPARED], first, Unkept(), store, None, processes, progress)
        multiply_out(trial, blr_modules(trial))
        again = statistics_of(trial, plan, batches, config, store, processes)
        del trial
        start = start_of(model, plan, batches, again, config, store, processes)
    return start
