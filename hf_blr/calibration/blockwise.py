"""Calibration one decoder layer at a time, so that only that layer's statistics are in memory."""

from __future__ import annotations

import re
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from hf_blr.calibration.grams import GramCollector
from hf_blr.calibration.precision import calibrating
from hf_blr.modes import evaluating

if TYPE_CHECKING:
    from typing_extensions import Self

Batch = dict[str, Tensor]
#: what a block is called with besides the hidden states: (args, kwargs)
Call = tuple[tuple[Any, ...], dict[str, Any]]


def iterate_grams(model: nn.Module, names: list[str], batches: list[Batch]) -> Generator[dict[str, Tensor], None, None]:
    """Yields {layer name: Gram `[K, K]`} for the layers of one block after the other; all come from the dense model.

    The caller may replace a block's layers as soon as it has its statistics: the next block's inputs are already
    computed. Where a model does not run as a plain chain of blocks, or the batches differ in shape, one pass over the
    whole model gathers everything and is yielded at once, which needs the memory for it.

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
            run(body, batch)
    return collector.grams


@contextmanager
def hooked(handles: list[RemovableHandle]) -> Iterator[None]:
    """Takes the hooks behind these handles off again at the end."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def run(model: nn.Module, batch: Batch) -> Any:
    """A calibration forward, which fills no key-value cache."""
    cache = {"use_cache": False} if hasattr(getattr(model, "config", None), "use_cache") else {}
    with calibrating(model):
        return model(**batch, **cache)


def body_of(model: nn.Module, names: list[str], batches: list[Batch]) -> nn.Module:
    """The model without its head, if that holds all of the layers: logits over a large vocabulary cost much memory."""
    body = getattr(model, "base_model", model)
    inside = {id(module) for module in body.modules()}
    held = all(id(model.get_submodule(name)) in inside for name in names)
    # only the head knows what to do with labels
    return body if held and not any("labels" in batch for batch in batches) else model


class BlockChain:
    """The repeated blocks of a model, with what each is called with besides the hidden states."""

    def __init__(self, groups: dict[str, list[str]], model: nn.Module, hidden: list[Tensor], calls: dict[str, Call]):
        self.groups, self.model, self.hidden, self.calls = groups, model, hidden, calls

    @classmethod
    @torch.no_grad()
    def trace(cls, model: nn.Module, names: list[str], batches: list[Batch]) -> Self | None:
        """Runs the first batch through and checks that each block's output is the next one's input, else None."""
        groups = group_by_block(names)
        shapes = [{key: value.shape for key, value in batch.items()} for batch in batches]
        # with masks or several shapes, blocks are called with other arguments on each batch
        if groups is None or any(s != shapes[0] for s in shapes) or any("mask" in key for key in batches[0]):
            return None
        body = body_of(model, names, batches)
        calls: dict[str, Call] = {}
        outputs: dict[str, Tensor] = {}

        def record(prefix: str) -> Callable[..., None]:
            def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
                calls[prefix], outputs[prefix] = (args, kwargs), first(output)

            return hook

        handles = [
            model.get_submodule(prefix).register_forward_hook(record(prefix), with_kwargs=True) for prefix in groups
        ]
        with hooked(handles):
            run(body, batches[0])
        order = list(groups)
        chained = list(calls) == order and all(args and torch.is_tensor(args[0]) for args, _ in calls.values())
        if not chained or any(outputs[a] is not calls[b][0][0] for a, b in zip(order, order[1:], strict=False)):
            return None
        first_block = model.get_submodule(order[0])
        hidden = [calls[order[0]][0][0], *(block_input(body, first_block, batch) for batch in batches[1:])]
        calls = {prefix: (args[1:], kwargs) for prefix, (args, kwargs) in calls.items()}
        return cls(groups, model, hidden, calls)

    def run(self) -> Iterator[dict[str, Tensor]]:
        for prefix, names in self.groups.items():
            block, call = self.model.get_submodule(prefix), self.calls.pop(prefix)
            with GramCollector({name: self.model.get_submodule(name) for name in names}) as collector:
                for i, hidden in enumerate(self.hidden):
                    self.hidden[i] = self.forward(block, hidden, call)
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


class ReachedBlock(Exception):
    """Ends a forward pass at the first block; carries its input."""

    def __init__(self, hidden: Tensor):
        self.hidden = hidden


def block_input(model: nn.Module, block: nn.Module, batch: Batch) -> Tensor:
    """The hidden states that enter a block of the model, computed without running it or what follows."""

    def stop(module: nn.Module, args: tuple[Any, ...]) -> None:
        raise ReachedBlock(args[0])

    handle = block.register_forward_pre_hook(stop)
    try:
        run(model, batch)
    except ReachedBlock as reached:
        return reached.hidden
    finally:
        handle.remove()
    raise RuntimeError("the first block did not run on a calibration batch although it ran on the one before")


def first(output: Any) -> Tensor:
    """A block returns its hidden states, alone or ahead of other things."""
    return output[0] if isinstance(output, tuple) else output
