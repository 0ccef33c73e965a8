"""Calibration one decoder layer at a time, so that only that layer's statistics are in memory."""

from __future__ import annotations

import re
from collections.abc import Callable, Generator, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hf_blr.calibration.calls import Batch, Call, first, record_calls, run
from hf_blr.calibration.grams import GramCollector
from hf_blr.calibration.padding import real_positions
from hf_blr.calibration.precision import calibrating
from hf_blr.modes import evaluating

if TYPE_CHECKING:
    from typing_extensions import Self


def iterate_grams(model: nn.Module, names: list[str], batches: list[Batch]) -> Generator[dict[str, Tensor], None, None]:
    """Yields {layer name: Gram `[K, K]`} for the layers of one block after the other; all come from the dense model.

    The caller may replace a block's layers as soon as it has its statistics: the next block's inputs are already
    computed. Where a model does not run as a plain chain of blocks, one pass over the whole model gathers everything
    and is yielded at once, which needs the memory for it.

    Args:
        names: dense linear layers, in the model's order.
        batches: keyword arguments of the model's forward, on its device.
    """
    with evaluating(model), torch.no_grad():
        chain = BlockChain.trace(model, names, batches)
        yield from chain.run() if chain is not None else [whole_model_grams(model, names, batches)]


def whole_model_grams(model: nn.Module, names: list[str], batches: list[Batch]) -> dict[str, Tensor]:
    """{layer name: Gram} from one pass over all batches."""
    body = body_of(model, names, batches)
    with torch.no_grad(), GramCollector({name: model.get_submodule(name) for name in names}) as collector:
        for batch in batches:
            collector.real = real_positions(batch, model)
            run(body, batch)
    return collector.grams


def body_of(model: nn.Module, names: list[str], batches: list[Batch]) -> nn.Module:
    """The model without its head, if that holds all of the layers: logits over a large vocabulary cost much memory."""
    body = getattr(model, "base_model", model)
    inside = {id(module) for module in body.modules()}
    held = all(id(model.get_submodule(name)) in inside for name in names)
    # only the head knows what to do with labels
    return body if held and not any("labels" in batch for batch in batches) else model


class BlockChain:
    """The repeated blocks of a model, with what each is called with on each batch besides the hidden states.

    groups: {block: its layers}. hidden: what enters the next block, batch by batch. calls: {block: its calls}.
    real: the positions of each batch that count, as `real_positions` gives them.
    """

    def __init__(
        self,
        groups: dict[str, list[str]],
        model: nn.Module,
        hidden: list[Tensor],
        calls: dict[str, list[Call]],
        real: list[Tensor | None],
    ):
        self.groups, self.model, self.hidden, self.calls, self.real = groups, model, hidden, calls, real

    @classmethod
    @torch.no_grad()
    def trace(cls, model: nn.Module, names: list[str], batches: list[Batch]) -> Self | None:
        """Records what the blocks are called with on each batch; None if the model is no plain chain of blocks."""
        groups = group_by_block(names)
        if groups is None:
            return None
        blocks = {prefix: model.get_submodule(prefix) for prefix in groups}
        recorded = record_calls(body_of(model, names, batches), blocks, batches)
        if recorded is None:
            return None
        return cls(groups, model, *recorded, [real_positions(batch, model) for batch in batches])

    def run(self) -> Iterator[dict[str, Tensor]]:
        for prefix, names in self.groups.items():
            block, calls = self.model.get_submodule(prefix), self.calls.pop(prefix)
            with GramCollector({name: self.model.get_submodule(name) for name in names}) as collector:
                for i, hidden in enumerate(self.hidden):
                    collector.real = self.real[i]
                    self.hidden[i] = self.forward(block, hidden, calls[i])
            yield collector.grams

    @torch.no_grad()
    def forward(self, block: nn.Module, hidden: Tensor, call: Call) -> Tensor:
        """The block's hidden states, for those that enter it; `call` is what else it was called with."""
        return self.forward_as(block, block, hidden, call)

    def forward_as(self, block: nn.Module, function: Callable[..., Any], hidden: Tensor, call: Call) -> Tensor:
        """Likewise by a function in the block's place, with a graph for gradients where they are enabled."""
        args, kwargs = call
        with calibrating(block):
            return first(function(hidden, *args, **kwargs))


def group_by_block(names: list[str]) -> dict[str, list[str]] | None:
    """{block: its layers} for names under one list of blocks, `prefix.<number>`; None if there are several lists."""
    groups: dict[str, list[str]] = {}
    for name in names:
        found = re.match(r"((?:.*?\.)?\d+)\.", name)
        if not found:
            return None
        groups.setdefault(found[1], []).append(name)
    lists = {prefix.rpartition(".")[0] for prefix in groups}
    numbers = [int(prefix.rpartition(".")[2]) for prefix in groups]
    consecutive = numbers == list(range(numbers[0], numbers[0] + len(numbers)))
    return groups if len(lists) == 1 and consecutive else None
