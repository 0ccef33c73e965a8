"""Statistics of all of the text, where each process has seen a part of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hf_blr.calibration.grams import Grams
from hf_blr.calibration.store import distinct
from hf_blr.processes import Processes

if TYPE_CHECKING:
    from hf_blr.calibration.fisher import Statistics


def summed(tensors: Mapping[str, Tensor], processes: Processes) -> dict[str, Tensor]:
    """{name: the sum over the processes}, in place where it can be; a process counts nothing for what it lacks.

    Names that share a tensor in all processes share one still.
    """
    groups = [(names, tuple(tensor.shape)) for names, tensor in distinct(tensors)]
    said = processes.gathered(groups)
    alike = all(each == groups for each in said)
    if not alike:
        # an expert, say, that the text of one process did not reach
        shapes = {name: shape for each in said for names, shape in each for name in names}
        groups = [([name], shape) for name, shape in shapes.items()]
    device = next((tensor.device for tensor in tensors.values()), None)
    found: dict[str, Tensor] = {}
    for names, shape in groups:
        total = tensors[names[0]] if names[0] in tensors else torch.zeros(shape, device=device)
        total = total if alike else total.clone()
        processes.add(total)
        found |= dict.fromkeys(names, total)
    return found


def summed_rows(rows: Mapping[str, int], processes: Processes) -> dict[str, int]:
    found: dict[str, int] = {}
    for each in processes.gathered(dict(rows)):
        for name, count in each.items():
            found[name] = found.get(name, 0) + count
    return found


def summed_grams(grams: Grams, processes: Processes) -> Grams:
    """The Gram matrices and rows of all processes together."""
    return Grams(summed(grams, processes), summed_rows(grams.rows, processes))


def summed_statistics(part: Statistics, processes: Processes) -> Statistics:
    """Those of all processes together; a layer is unreached where it is so in each of them."""
    said = processes.gathered((part.tokens, part.unreached))
    return replace(
        part,
        grams=summed(part.grams, processes),
        output_grams=summed(part.output_grams, processes),
        tokens=sum(tokens for tokens, _ in said),
        unreached=frozenset.intersection(*(unreached for _, unreached in said)),
        rows=summed_rows(part.rows, processes),
    )
