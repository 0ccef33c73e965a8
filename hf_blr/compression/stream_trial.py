"""Forwards over random token ids in which modules run on other tensors than their own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hf_blr.calibration.batches import device_of, text_batch
from hf_blr.calibration.calls import hooked
from hf_blr.calibration.precision import float32_products
from hf_blr.modes import evaluating

#: sequences and tokens
TRIAL = 2, 16
#: (module's name, module) -> tensors in the place of its parameters for a forward
Tensors = Callable[[str, nn.Module], Mapping[str, Tensor]]


class Watcher:
    """Is told of a trial's calls of modules with parameters of their own."""

    def entered(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A module is called."""

    def left(self, name: str, output: Any) -> None:
        """It has returned."""


def owners_of(model: nn.Module) -> dict[str, nn.Module]:
    """{name: module} of those that hold parameters of their own."""
    return {name: m for name, m in model.named_modules() if any(True for _ in m.parameters(recurse=False))}


def plain_tensors(name: str, module: nn.Module) -> dict[str, Tensor]:
    """Its own parameters, in float32 or wider."""
    own = module.named_parameters(recurse=False)
    return {key: p.detach().to(torch.promote_types(p.dtype, torch.float32)) for key, p in own}


@torch.no_grad()
def trial_outputs(model: nn.Module, vocabulary: int, tensors: Tensors, watcher: Watcher | None = None) -> Tensor:
    """The model's first output on random token ids, in float64.

    Nothing of the model changes, and the tensors of one module at a time are in memory beside it.

    Args:
        vocabulary: V; ids are below.
        tensors: what each module with parameters of its own runs on.
    """
    ids = torch.randint(vocabulary, TRIAL, generator=torch.Generator().manual_seed(0)).to(device_of(model))
    owners, watcher = owners_of(model), watcher or Watcher()
    kept: dict[str, dict[str, Any]] = {}
    handles = []
    for name, module in owners.items():

        def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], name: str = name) -> None:
            watcher.entered(name, args, kwargs)
            kept[name] = dict(module._parameters)
            for key, tensor in tensors(name, module).items():
                module._parameters[key] = nn.Parameter(tensor, requires_grad=False)

        def leave(module: nn.Module, args: tuple[Any, ...], output: Any, name: str = name) -> None:
            module._parameters.update(kept.pop(name))
            watcher.left(name, output)

        handles.append(module.register_forward_pre_hook(enter, with_kwargs=True))
        handles.append(module.register_forward_hook(leave))
    try:
        with hooked(handles), evaluating(model), float32_products("ieee"):
            output = model(**text_batch(model, ids))
    finally:
        # of modules that an error has left
        for name, parameters in kept.items():
            owners[name]._parameters.update(parameters)
    logits = getattr(output, "logits", None)
    found: Any = logits if logits is not None else output[0]
    return found.double()
