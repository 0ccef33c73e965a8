"""How far a run of fits has come, for one that goes on where another was stopped."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import TYPE_CHECKING

from torch import nn

from hf_blr.calibration.problem import Problem

if TYPE_CHECKING:
    from hf_blr.calibration.joint import BlockReport


class Progress:
    """What is finished before a run begins, and who is told of more; this one is of a run that nobody remembers.

    Attributes:
        layers: names of those that were replaced or moved. They are dense again, and only have to be put in place.
        blocks: names of those with which everything is done.
    """

    layers: Collection[str] = ()
    blocks: Collection[str] = ()

    def block_done(self, name: str, block: nn.Module, report: BlockReport | None) -> None:
        """Called once all layers of a block are in place, and refined if they are to be."""

    def has_all(self, names: Iterable[str]) -> bool:
        """Whether all of these layers are finished."""
        return all(name in self.layers for name in names)

    def problems(self, names: Iterable[str]) -> dict[str, Problem]:
        """For those of the layers that are finished, nothing to fit."""
        return {name: Problem(None) for name in names if name in self.layers}
