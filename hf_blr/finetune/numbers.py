"""Factors in bits as numbers, for as long as these train, and rounded anew in the metric of the text that they see.

A code that flips alone is not made up for, so that a training of codes undoes what a careful rounding gained unless it
is long. Numbers train as they always do, and when they are rounded then, later ones make up for the errors of earlier.
Whole matrices have nothing to learn as numbers: they are the dense model's, which is what the training aims at.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hf_blr.calibration.calls import Batch
from hf_blr.calibration.fisher import Statistics, fisher_statistics
from hf_blr.experts import ExpertsLinear
from hf_blr.factorize import FitOptions, round_factors
from hf_blr.factorize.options import damping_of
from hf_blr.finetune.masters import cast
from hf_blr.formats import Bits, Codes
from hf_blr.linear import BLRLinear, blr_modules
from hf_blr.structures import structure_named


@contextmanager
def as_numbers(model: nn.Module, batches: list[Batch]) -> Iterator[None]:
    """Inside the `with`, factors in bits are the numbers that they stand for; at its end they are codes and scales.

    Whole matrices and experts stay in bits. After an error the layers hold what they held before.

    Args:
        model: compressed, on the device of the batches.
        batches: what says at the end what the inputs of each layer are like, and what the loss feels of its outputs.

    Raises:
        ValueError: if there is no such layer.
    """
    layers = {
        name: module
        for name, module in blr_modules(model).items()
        if module.storage.in_bits(module.spec)
        and not structure_named(module.spec.structure).whole
        and not isinstance(module, ExpertsLinear)
    }
    if not layers:
        raise ValueError('no layer but experts has factors in bits, so that none could train as numbers: take "scales"')
    try:
        for name, module in layers.items():
            model.set_submodule(name, in_numbers(module))
        yield
        known = fisher_statistics(model, list(layers), batches)
        for name, module in layers.items():
            take(module, model.get_submodule(name), name, known)
    finally:
        for name, module in layers.items():
            model.set_submodule(name, module)


@torch.no_grad()
def in_numbers(module: BLRLinear) -> BLRLinear:
    """The same layer with the numbers of its codes, in float32 whatever the layer's dtype, which would round them."""
    numbers = module.tensors(torch.float32)
    layer = BLRLinear.from_fit(module.spec, numbers, module)
    cast(layer, torch.float32)
    for name, factor in layer.factors().items():
        factor.data.copy_(numbers[name])
    return layer


@torch.no_grad()
def take(module: BLRLinear, trained: Any, name: str, known: Statistics) -> None:
    """Rounds the trained numbers into the layer that keeps them in bits."""
    numbers: dict[str, Tensor] = {key: tensor.detach() for key, tensor in trained.tensors().items()}
    grams, storage = (known.grams.get(name), known.output_grams.get(name)), module.storage
    assert isinstance(storage, Bits)
    options = FitOptions(damping=damping_of(None, module.in_features, known.rows_of(name)))
    rounded = round_factors(numbers, module.spec, *grams, options, storage)
    for key, tensor in rounded.tensors.items():
        kept = getattr(module, key)
        if isinstance(tensor, Codes):
            kept.take(tensor)
        else:
            kept.data.copy_(tensor)
    if module.bias is not None:
        module.bias.data.copy_(trained.bias)
