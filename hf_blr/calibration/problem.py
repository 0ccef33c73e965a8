"""What a fit is told of one layer: its inputs, and what to come close to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from hf_blr.calibration.grams import Grams
from hf_blr.calibration.padding import real_rows
from hf_blr.calibration.residual import add_product, wide_parts
from hf_blr.calibration.summed import summed_grams
from hf_blr.processes import ALONE, Processes


@dataclass(frozen=True)
class Problem:
    """One layer to fit.

    gram: of its inputs, `[K, K]`. target: the matrix to approximate, if not its weight. rows: of the Gram matrix' X.
    """

    gram: Tensor | None
    target: Tensor | None = None
    rows: int = 0


def problems_of(grams: Grams) -> dict[str, Problem]:
    """Those of layers that are to come close to their weights on these inputs."""
    return {name: Problem(gram, rows=grams.rows[name]) for name, gram in grams.items()}


def plain_problem(inputs: Sequence[Tensor], real: list[Tensor | None], processes: Processes = ALONE) -> Problem:
    """With all inputs of a layer, which may run several times in a run of its block; in order of the runs."""
    calls, odd = divmod(len(inputs), len(real))
    gram: Tensor | None = None
    count = 0
    for i, x in enumerate(inputs):
        rows = real_rows(x, None if odd else real[i // calls])
        for (part,) in wide_parts(rows):
            gram = add_product(gram, part, part)
        count += len(rows)
    grams = summed_grams(Grams({} if gram is None else {"": gram}, {"": count}), processes)
    return Problem(grams.get(""), rows=grams.rows[""])
