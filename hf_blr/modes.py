"""Training and evaluation mode, for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """`model.eval()` for a while; then each module has its own mode again, and so has what took its place meanwhile.

    A part that was frozen in evaluation mode, its dropout off, stays so where `model.train()` would wake it.
    """
    modes = {name: module.training for name, module in model.named_modules()}
    model.eval()
    try:
        yield
    finally:
        for name, module in model.named_modules():
            module.training = modes.get(name, module.training)


@contextmanager
def without_dropout(model: nn.Module) -> Iterator[None]:
    """Forwards of a model in training mode run its parts in evaluation mode, whatever a loop does to them between."""

    def quiet(module: nn.Module, *_: object) -> None:
        for child in module.children():
            child.eval()

    handle = model.register_forward_pre_hook(quiet)
    try:
        yield
    finally:
        handle.remove()
