"""A gated MLP whose two first projections, and the product of their outputs, run as one."""

from __future__ import annotations

import functools
from typing import Any, SupportsIndex

from torch import Tensor, nn

from hf_blr.inference.activations import activation_of
from hf_blr.inference.grouped import ProjectionGroup
from hf_blr.inference.trial import alike, on_trial
from hf_blr.linear import BLRLinear


def fuse_gate(parent: nn.Module, *names: str) -> bool:
    first, second, attribute, last = names
    kind = activation_of(parent, attribute)
    gate, up = parent._modules.get(first), parent._modules.get(second)
    if not (kind and isinstance(gate, BLRLinear) and isinstance(up, BLRLinear)):
        return False
    if group_of(gate, up) is None or gate.spec != up.spec:
        return False

    def apart(x: Tensor) -> Tensor:
        down, activation = getattr(parent, last), getattr(parent, attribute)
        out: Tensor = down(activation(gate(x)) * up(x))
        return out

    if not alike(on_trial(parent, gate), on_trial(apart, gate)):
        return False
    parent.__class__ = gated_class(type(parent), first, second, last, kind)  # type: ignore[arg-type]
    return True


def group_of(gate: nn.Module | None, up: nn.Module | None) -> ProjectionGroup | None:
    """What these two share if they, and nothing else, run together; None otherwise."""
    if not isinstance(gate, BLRLinear) or gate.group is None:
        return None
    group, _ = gate.group
    return group if group.modules == [gate, up] else None


@functools.cache
def gated_class(base: type[nn.Module], first: str, second: str, last: str, kind: str) -> type[nn.Module]:
    """A class whose two first projections run as one: by classes torch.compile sees that blocks are equal."""

    class Gated(base):  # type: ignore[misc, valid-type]
        before_fusion = base

        def forward(self, x: Tensor) -> Any:
            group = group_of(self._modules[first], self._modules[second])
            hidden = None if group is None else group.gated(x, kind)
            return super().forward(x) if hidden is None else getattr(self, last)(hidden)

        def __reduce_ex__(self, protocol: SupportsIndex) -> tuple[Any, ...]:
            # no module holds this class by name
            return made_again, (base, first, second, last, kind), self.__dict__

    Gated.__name__, Gated.__qualname__, Gated.__module__ = base.__name__, base.__qualname__, base.__module__
    return Gated


def made_again(base: type[nn.Module], *names: str) -> nn.Module:
    """An instance of a `gated_class` without its state, for copies and pickles."""
    cls = gated_class(base, *names)  # type: ignore[arg-type]
    return cls.__new__(cls)
