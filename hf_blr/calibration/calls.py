"""Forward passes on calibration batches, and what a block is called with in one, so that it can run again alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from hf_blr.calibration.precision import calibrating

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Call:
    """What a block is called with besides the hidden states, and by what name it takes those (None: as the first)."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    key: str | None = None

    def on(self, function: Callable[..., Any], hidden: Tensor) -> Tensor:
        """The hidden states that leave the block, or a function in its place, for those that enter."""
        if self.key is None:
            return first(function(hidden, *self.args, **self.kwargs))
        return first(function(*self.args, **{self.key: hidden}, **self.kwargs))


class ReachedBlock(Exception):
    """Ends a forward pass where its caller has seen enough; carries the tensor that was there."""

    def __init__(self, hidden: Tensor):
        self.hidden = hidden


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
    config = getattr(model, "config", None)
    # a model of text and images keeps the text's settings apart, one of two models those of its decoder
    parts = (config, getattr(config, "text_config", None), getattr(config, "decoder", None))
    caches = any(hasattr(each, "use_cache") for each in parts)
    cache = {"use_cache": False} if caches else {}
    with calibrating(model):
        return model(**batch, **cache)


def first(output: Any) -> Any:
    """A block returns its hidden states, alone or ahead of other things."""
    return output[0] if isinstance(output, tuple) else output


def handed(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What a layer is called with: its first argument, by whatever name."""
    return args[0] if args else next(iter(kwargs.values()))


def writes_to(x: Tensor) -> int:
    """How often a tensor was written to in place; in inference mode nothing counts that."""
    return 0 if x.is_inference() else x._version


def without_cache(argument: Any) -> Any:
    return None if hasattr(argument, "get_seq_length") else argument


def split_call(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor | None, Call]:
    """(the hidden states, what else a block was called with); None where it was handed no tensor to begin with.

    Key-value caches are left out. Some models fill one whatever they are told (Flaubert, XLM): it is empty here, and
    would grow each time that the block runs again.
    """
    args, kwargs = tuple(map(without_cache, args)), {key: without_cache(value) for key, value in kwargs.items()}
    if args:
        return (args[0] if torch.is_tensor(args[0]) else None), Call(args[1:], kwargs)
    key = next((key for key, value in kwargs.items() if torch.is_tensor(value)), None)
    return (
        None if key is None else kwargs[key],
        Call((), {name: value for name, value in kwargs.items() if name != key}, key),
    )
