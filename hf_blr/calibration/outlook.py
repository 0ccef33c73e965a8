"""What the factors of one block are refined towards, and how far behind the block its error is seen."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from hf_blr.calibration.calls import Call
from hf_blr.calibration.residual import counted
from hf_blr.calibration.store import Store

#: how much of what the stream has lost before it a block is refined to make up for. With all of it as target, its inner
#: layers give up the loss's own weighting to repair the stream; with none, losses pile up. Of those three, half gave
#: the lowest perplexity
STREAM_SHARE = 0.5
#: so many blocks behind the refined one run before its error is measured
AHEAD = 0


class Runs(Protocol):
    """What runs one block of a chain."""

    store: Store

    def forward_as(self, block: nn.Module, function: Callable[..., Any], hidden: Tensor, call: Call) -> Tensor: ...


@dataclass(frozen=True)
class Stage:
    """A block with its calls in the compressed and in the dense model, and the positions that count, run by run."""

    block: nn.Module
    calls: list[Call]
    dense_calls: list[Call]
    real: list[Tensor | None]


class Outlook:
    """A block that is refined, and the still dense ones behind it through which its error is seen.

    Args:
        chain: runs blocks.
        stages: the block, and those behind it.
    """

    def __init__(self, chain: Runs, stages: list[Stage]):
        self.chain, self.stages = chain, stages

    def run(self, function: Callable[..., Any], hidden: Tensor, run: int) -> Tensor:
        """What leaves the last stage with a function in the place of the first block: rows that count."""
        return counted(self.through(function, hidden, run), self.stages[-1].real[run])

    def through(self, function: Callable[..., Any], hidden: Tensor, run: int) -> Tensor:
        first, *others = self.stages
        out = self.chain.forward_as(first.block, function, hidden, first.calls[run])
        for stage in others:
            out = self.chain.forward_as(stage.block, stage.block, out, stage.calls[run])
        return out

    @torch.no_grad()
    def wanted(self, entered: Sequence[Tensor], left: Sequence[Tensor]) -> Sequence[Tensor]:
        """`STREAM_SHARE` of the way from what the still dense blocks make of these inputs to the dense stream.

        Args:
            entered: what the compressed model hands the first stage.
            left: what leaves it in the dense model.
        """

        def aims() -> Any:
            for i, (x, y) in enumerate(zip(entered, left, strict=True)):
                for stage in self.stages[1:]:
                    y = self.chain.forward_as(stage.block, stage.block, y, stage.dense_calls[i])
                own = self.through(self.stages[0].block, x, i)
                yield counted(torch.lerp(own, y, STREAM_SHARE), self.stages[-1].real[i])

        return self.chain.store.list(aims())
