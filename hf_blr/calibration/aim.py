"""What the factors of one block are refined towards, and how the block is run for that."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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


class Runs(Protocol):
    """What runs the blocks of a model one by one."""

    store: Store

    def forward_as(self, block: nn.Module, function: Callable[..., Any], hidden: Tensor, call: Call) -> Tensor: ...


class Aim:
    """A block that is to be refined.

    Args:
        chain: runs it.
        block: with factors or still dense.
        calls: what it is called with in the compressed model, run by run.
        real: the positions that count in each run; None where all do.
    """

    def __init__(self, chain: Runs, block: nn.Module, calls: list[Call], real: list[Tensor | None]):
        self.chain, self.block, self.calls, self.real = chain, block, calls, real

    def run(self, function: Callable[..., Any], hidden: Tensor, run: int) -> Tensor:
        """What leaves a function in the block's place, at positions that count."""
        return counted(self.chain.forward_as(self.block, function, hidden, self.calls[run]), self.real[run])

    @torch.no_grad()
    def wanted(self, entered: Sequence[Tensor], left: Sequence[Tensor]) -> Sequence[Tensor]:
        """`STREAM_SHARE` of the way from what the still dense block makes of these inputs to the dense stream.

        Args:
            entered: what the compressed model hands the block.
            left: what leaves it in the dense model.
        """
        return self.chain.store.list(
            torch.lerp(self.run(self.block, x, i), counted(y, self.real[i]), STREAM_SHARE)
            for i, (x, y) in enumerate(zip(entered, left, strict=True))
        )
