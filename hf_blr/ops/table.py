"""What runs for each structure: its plain PyTorch form, and its registered op where it has kernels.

A plain dict, filled when a structure is first asked for: torch.compile traces a look-up and no import.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_blr.ops.bits_library import define_bits
from hf_blr.ops.library import define_structure
from hf_blr.structures import FACTOR, structure_named, structures, whole_structures


@dataclass(frozen=True)
class Implementation:
    """The functions behind one structure's record.

    Args:
        name: of the structure.
        linear, dense, fits, experts, pair: as in `structures.Structure`.
        factors: how many of the layer's tensors are factors; they come first.
        kernel: (x, tensors, bias, activation) -> out, differentiable, by registered ops; None without kernels.
        pays: (tokens) -> whether the kernels beat PyTorch's products.
        grouped: whether there are kernels that run several such layers on one input.
    """

    name: str
    linear: Callable[..., Tensor]
    dense: Callable[..., Tensor]
    fits: Callable[..., bool]
    experts: Callable[..., Tensor] | None
    factors: int
    kernel: Callable[..., Tensor] | None
    pays: Callable[[int], bool] | None
    grouped: bool
    pair: Callable[..., tuple[Tensor, Tensor]] | None


_table: dict[str, Implementation] = {}


def implementation_of(structure: str) -> Implementation:
    """Of a structure that is registered. Raises ValueError that lists the names for any other."""
    found = _table.get(structure)
    return load(structure) if found is None else found


def load(structure: str) -> Implementation:
    """Import what the structure's record names, and keep it."""
    record = structure_named(structure)
    define_bits(record)
    _table[structure] = Implementation(
        record.name,
        record.load("linear"),
        record.load("dense"),
        record.load("fits"),
        record.load("experts"),
        len(record.spec.names(FACTOR)),
        define_structure(record) if record.kernels else None,
        record.load("kernels_pay"),
        bool(record.grouped),
        record.load("pair"),
    )
    return _table[structure]


def multiplied_out(found: Implementation, tensors: Sequence[Tensor]) -> Tensor:
    """The dense matrix `[N, K]` of the tensors, built in their own dtype whatever autocast says."""
    with torch.autocast(tensors[0].device.type, enabled=False):
        return found.dense(*tensors)


for _name in (*structures(), *whole_structures()):
    load(_name)
