"""Layers in bits in the form that trains, and back in the form in which they are kept."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from hf_blr.formats import FactorInBits, FactorInTraining
from hf_blr.linear import blr_modules
from hf_blr.structures import structure_named

#: what trains of factors in bits: scales; those and the codes of factors; those and all codes, of whole matrices too
SCALES, FACTOR_CODES, CODES = WHAT_TRAINS = ("scales", "factor_codes", "codes")


def factors_in_bits(root: nn.Module) -> dict[str, FactorInBits | FactorInTraining]:
    """{name below `root`: holder} of all factors that are kept in bits, in either form."""
    return {
        f"{path}.{name}": held
        for path, layer in blr_modules(root).items()
        for name, held in layer.named_children()
        if isinstance(held, (FactorInBits, FactorInTraining))
    }


def whole_in_bits(root: nn.Module) -> set[str]:
    """The names in `factors_in_bits` of what is no factor, but a whole matrix."""
    layers = {path for path, layer in blr_modules(root).items() if structure_named(layer.spec.structure).whole}
    return {name for name in factors_in_bits(root) if name.rpartition(".")[0] in layers}


def forms_in(root: nn.Module) -> dict[str, FactorInTraining]:
    """{name below `root`: form} of the factors in bits that are in the form that trains."""
    return {name: held for name, held in factors_in_bits(root).items() if isinstance(held, FactorInTraining)}


def trained_bits(root: nn.Module) -> list[nn.Parameter]:
    """What trains of factors in bits: the scales' logarithms, and codes."""
    forms = forms_in(root).values()
    return [form.log_scale for form in forms] + [form.latent for form in forms if form.codes_train]


def check_what(argument: str, what: str) -> None:
    """Raises ValueError, naming the argument, for what is none of `WHAT_TRAINS`."""
    if what not in WHAT_TRAINS:
        raise ValueError(f"{argument} must be one of {', '.join(map(repr, WHAT_TRAINS))}, got {what!r}")


def open_bits(root: nn.Module, what: str, forms: dict[str, FactorInTraining] | None = None) -> None:
    """Puts all factors in bits into the form that trains.

    Args:
        root: a compressed model, or a part of one.
        what: one of `WHAT_TRAINS`. Codes train together with their scales.
        forms: those of an earlier training of the same model, to go on with the same parameters.

    Raises:
        ValueError: for another word.
    """
    check_what("bits", what)
    found = factors_in_bits(root)
    codes = {SCALES: set(), FACTOR_CODES: found.keys() - whole_in_bits(root), CODES: found.keys()}[what]
    for name, held in found.items():
        if isinstance(held, FactorInTraining):
            if held.codes_train == (name in codes):
                continue
            held = held.stored()
        if forms is not None and name in forms:
            form = forms[name]
            form.follow(held)
        else:
            form = FactorInTraining(held, name in codes)
        root.set_submodule(name, form)


def close_bits(root: nn.Module) -> dict[str, FactorInTraining]:
    """Puts all factors in bits back into the form in which they are kept; returns {name: the form that trained}."""
    forms = forms_in(root)
    for name, form in forms.items():
        root.set_submodule(name, form.stored())
    return forms


@contextmanager
def training_form(root: nn.Module, what: str) -> Iterator[None]:
    """Inside the `with`, factors in bits train as `open_bits` says."""
    open_bits(root, what)
    try:
        yield
    finally:
        close_bits(root)
