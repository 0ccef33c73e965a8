"""Gradients by the outputs of layers, summed into matrices G by hooks while batches run forward and back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hf_blr.calibration.calls import hooked
from hf_blr.calibration.grams import GramCollector
from hf_blr.calibration.padding import real_rows
from hf_blr.factorize.metric import metric_blocks


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Inside, no parameter gets a gradient."""
    trained = [p for p in model.parameters() if p.requires_grad]
    model.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


@contextmanager
def watching(
    model: nn.Module, names: list[str], labels: dict[str, str], output_grams: dict[str, Tensor]
) -> Iterator[GramCollector]:
    """Inside, forwards add to the Gram matrices of these layers, and backwards to `output_grams`."""
    modules = {name: model.get_submodule(name) for name in names}
    collector = GramCollector(modules, labels)
    handles = [
        module.register_forward_hook(watch(name, labels.get(name, name), output_grams, collector))
        for name, module in modules.items()
    ]
    with hooked(handles), collector:
        yield collector


def watch(
    name: str, label: str, output_grams: dict[str, Tensor], collector: GramCollector
) -> Callable[[nn.Module, Any, Tensor], Tensor]:
    """A forward hook that adds the gradients by the layer's outputs to the matrix G of that label, where they count."""

    def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        # numbers only: a hook that held on to its own tensor would keep the whole graph until the next collection
        blocks, size = metric_blocks(output.shape[-1]), output.shape[-1]
        real = collector.real.get(name)

        def add(gradient: Tensor) -> None:
            rows = real_rows(gradient.detach(), real)
            g = rows.reshape(-1, blocks, size // blocks).float().transpose(0, 1)
            product = g.mT @ g
            if label in output_grams:
                output_grams[label] += product
            else:
                output_grams[label] = product

        if not torch.is_grad_enabled():
            # the model itself lets no gradient through, as where it only picks what to attend to
            return output
        if not output.requires_grad or output._is_view():
            # before the first watched layer nothing needs a gradient. A sum, since models write into outputs, which
            # may not be where gradients end; a view that is written to loses its hook
            output = output + torch.zeros((), dtype=output.dtype, device=output.device, requires_grad=True)
        output.register_hook(add)
        return output

    return hook
