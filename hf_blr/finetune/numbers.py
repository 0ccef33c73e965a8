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
from hf_blr.dense import dense_weight, is_dense_linear
from hf_blr.experts import ExpertsLinear
from hf_blr.factorize import FitOptions, factorize, round_factors
from hf_blr.factorize.options import damping_of
from hf_blr.formats import Bits, Codes
from hf_blr.linear import BLRLinear, blr_modules
from hf_blr.structures import structure_named


@contextmanager
def as_numbers(model: nn.Module, teacher: nn.Module, batches: list[Batch]) -> Iterator[None]:
    """Inside the `with`, factors in bits are numbers, fitted to the teacher's matrices; at its end codes and scales.

    Fitted anew, since what codes stand for has been rounded once. Whole matrices and experts stay in bits. After an
    error the layers hold what they held before.

    Args:
        model: compressed, on the device of the batches.
        teacher: the dense model that it was made of.
        batches: what says what the inputs of each layer are like, and what the loss feels of its outputs.

    Raises:
        ValueError: if there is no such layer.
    """
    modules = dict(teacher.named_modules())
    layers = {
        name: module
        for name, module in blr_modules(model).items()
        if module.storage.in_bits(module.spec)
        and not structure_named(module.spec.structure).whole
        and not isinstance(module, ExpertsLinear)
        and name in modules
        and is_dense_linear(modules[name])
    }
    if not layers:
        raise ValueError(
            "no layer has factors in bits and a dense layer of its name in the teacher, so that none could train as "
            'numbers; take bits="scales", and as teacher the dense model that this one was made of'
        )
    try:
        known = fisher_statistics(teacher, list(layers), batches)
        for name, module in layers.items():
            grams = known.grams.get(name), known.output_grams.get(name)
            fitted = factorize(dense_weight(modules[name]), module.spec, *grams, options_for(module, name, known))
            model.set_submodule(name, BLRLinear.from_fit(module.spec, fitted.tensors, module))
        yield
        known = fisher_statistics(model, list(layers), batches)
        for name, module in layers.items():
            take(module, model.get_submodule(name), name, known)
    finally:
        for name, module in layers.items():
            model.set_submodule(name, module)


def options_for(module: BLRLinear, name: str, known: Statistics) -> FitOptions:
    return FitOptions(damping=damping_of(None, module.in_features, known.rows_of(name)))


@torch.no_grad()
def take(module: BLRLinear, trained: Any, name: str, known: Statistics) -> None:
    """Rounds the trained numbers into the layer that keeps them in bits."""
    numbers: dict[str, Tensor] = {key: tensor.detach() for key, tensor in trained.tensors(torch.float32).items()}
    grams, storage = (known.grams.get(name), known.output_grams.get(name)), module.storage
    assert isinstance(storage, Bits)
    rounded = round_factors(numbers, module.spec, *grams, options_for(module, name, known), storage)
    for key, tensor in rounded.tensors.items():
        held = getattr(module, key)
        if isinstance(tensor, Codes):
            held.take(tensor)
        else:
            held.data.copy_(tensor)
    if module.bias is not None:
        module.bias.data.copy_(trained.bias)
