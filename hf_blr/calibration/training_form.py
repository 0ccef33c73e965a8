"""Layers in bits in the form that trains, and back in the form in which they are kept."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from hf_blr.formats import FactorInBits, FactorInTraining
from hf_blr.linear import blr_modules

#: what trains of a factor in bits
SCALES, CODES = "scales", "codes"


def factors_in_bits(root: nn.Module) -> dict[str, FactorInBits | FactorInTraining]:
    """{name below `root`: holder} of all factors that are kept in bits, in either form."""
    return {
        f"{path}.{name}": held
        for path, layer in blr_modules(root).items()
        for name, held in layer.named_children()
        if isinstance(held, (FactorInBits, FactorInTraining))
    }


def forms_in(root: nn.Module) -> dict[str, FactorInTraining]:
    """{name below `root`: form} of the factors in bits that are in the form that trains."""
    return {name: held for name, held in factors_in_bits(root).items() if isinstance(held, FactorInTraining)}


def trained_bits(root: nn.Module) -> list[nn.Parameter]:
    """What trains of factors in bits: the scales' logarithms, and codes."""
    forms = forms_in(root).values()
    return [form.log_scale for form in forms] + [form.latent for form in forms if form.codes_train]


def open_bits(root: nn.Module, what: str, forms: dict[str, FactorInTraining] | None = None) -> None:
    """Puts all factors in bits into the form that trains.

    Args:
        root: a compressed model, or a part of one.
        what: "scales", or "codes" for codes and scales.
        forms: those of an earlier training of the same model, to go on with the same parameters.

    Raises:
        ValueError: for anything else than these two words.
    """
    if what not in (SCALES, CODES):
        raise ValueError(f'bits must be "{SCALES}" or "{CODES}", which trains both, got {what!r}')
    for name, held in factors_in_bits(root).items():
        if isinstance(held, FactorInTraining):
            if held.codes_train == (what == CODES):
                continue
            held = held.stored()
        if forms is not None and name in forms:
            form = forms[name]
            form.follow(held)
        else:
            form = FactorInTraining(held, what == CODES)
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
