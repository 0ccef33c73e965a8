"""Layers in another form of the same matrix, for as long as gradient steps move them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from hf_blr.calibration.fisher import Statistics
from hf_blr.experts import ExpertsLinear
from hf_blr.linear import BLRLinear, blr_modules
from hf_blr.structures import structure_named


def stood_in(root: nn.Module) -> dict[str, BLRLinear]:
    """{name below `root`: layer} of those whose structure trains in another form than it is stored.

    Experts train as they are stored, and so do layers in bits: codes are of the factors that are stored.
    """
    return {
        name: module
        for name, module in blr_modules(root).items()
        if structure_named(module.spec.structure).stand_in
        and not isinstance(module, ExpertsLinear)
        and not module.storage.in_bits(module.spec)
    }


@contextmanager
def with_stand_ins(root: nn.Module, statistics: Statistics | None = None) -> Iterator[None]:
    """Inside the `with`, each layer of `stood_in` is replaced by one of the same matrix in the form that trains well.

    At the end the matrix, then a different one, goes back into the layers that left, so that what holds them stays
    valid.

    Args:
        root: a model or a part of one.
        statistics: of these layers, by their names below `root`; None takes the plain metric.
    """
    layers = stood_in(root)
    forms: dict[str, Any] = {}
    grams, output_grams = ({}, {}) if statistics is None else (statistics.grams, statistics.output_grams)
    try:
        for name, module in layers.items():
            stand_in = structure_named(module.spec.structure).load("stand_in")
            forms[name] = stand_in.opened(module, grams.get(name), output_grams.get(name))
            root.set_submodule(name, forms[name].layer)
        yield
    finally:
        # stopped on the way in, some stand in and some do not
        for name, form in forms.items():
            structure_named(layers[name].spec.structure).load("stand_in").closed(layers[name], form)
            root.set_submodule(name, layers[name])
