"""Activations that the projection before them applies, while its last stage stores: part of `hf_blr.fuse`.

A pass over an MLP's hidden layer costs as much as the projection itself on small models. Nothing here holds for good:
whatever takes a projection's place, or its training, brings the model's own activation back.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, SupportsIndex

import torch
from torch import Tensor, nn

from hf_blr.experts import Experts
from hf_blr.inference.grouped import ProjectionGroup
from hf_blr.linear import BLRLinear
from hf_blr.ops import use_impl

#: (projection, activation) in one parent, the second called on what the first returns
AFTER = (
    ("fc1", "activation_fn"),
    ("fc1", "act"),
    ("fc1", "activation"),
    ("wi", "act"),
    ("c_fc", "act"),
    ("dense", "intermediate_act_fn"),
    ("dense_h_to_4h", "act"),
    ("fc_in", "act"),
    ("proj", "gelu"),
)
#: (gate, up, activation, down) of a gated MLP: down(activation(gate(x)) * up(x))
GATED = (("gate_proj", "up_proj", "act_fn", "down_proj"),)
#: {class of an activation: its name in `ops.activations.ACTIVATIONS`}
CLASSES = {
    "GELUActivation": "gelu",
    "NewGELUActivation": "gelu_tanh",
    "FastGELUActivation": "gelu_tanh",
    "GELUTanh": "gelu_tanh",
    "PytorchGELUTanh": "gelu_tanh",
    "QuickGELUActivation": "quick_gelu",
    "ReLU": "relu",
    "SiLU": "silu",
    "SiLUActivation": "silu",
}
APPROXIMATIONS = {"none": "gelu", "tanh": "gelu_tanh"}

#: what is called with hidden states
Function = Callable[[Tensor], Any]


class FusedActivation(nn.Module):
    """An activation in the place where its model keeps it, which passes on what comes activated already."""

    def __init__(self, activation: Function, parent: nn.Module, projection: str):
        super().__init__()
        self.activation = activation
        # a tuple hides the parent from nn.Module, whose child this is
        self.place = parent, projection

    def forward(self, x: Tensor) -> Tensor:
        parent, name = self.place
        projection = parent._modules.get(name)
        if isinstance(projection, BLRLinear) and projection.activation:
            return x
        return self.activation(x)


def fuse_activations(parent: nn.Module) -> list[tuple[str, ...]]:
    """Let the children of a module apply the activations between them.

    Each is tried on a small random input, and undone unless the parent gives the same output as before.

    Returns:
        (projection, activation), or (gate, up, activation), by their names in the parent.
    """
    # one with a forward of its own may do anything
    if parent.training or "forward" in vars(parent) or isinstance(parent, Experts):
        return []
    # from a call of `fuse` before; training may have undone the projections' part of it
    bring_back(parent)
    for child in parent.children():
        if isinstance(child, BLRLinear):
            child.activation = ""
    found = [pair for pair in AFTER if fuse_after(parent, *pair)]
    return found + [names[:3] for names in GATED if fuse_gate(parent, *names)]


def fuse_after(parent: nn.Module, name: str, attribute: str) -> bool:
    projection, kind = parent._modules.get(name), activation_of(parent, attribute)
    if not (kind and isinstance(projection, BLRLinear)) or projection.activation or projection.device.type == "meta":
        return False
    expected = on_trial(parent, projection)
    activation = getattr(parent, attribute)
    put(parent, attribute, FusedActivation(activation, parent, name))
    projection.activation = kind
    if alike(expected, on_trial(parent, projection)):
        return True
    projection.activation = ""
    take_out(parent, attribute)
    return False


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


def bring_back(parent: nn.Module) -> None:
    """Undo `fuse_activations` but for the projections' own part, which `BLRLinear.stand_alone` undoes."""
    for name, value in [*vars(parent).items(), *parent._modules.items()]:
        if isinstance(value, FusedActivation):
            take_out(parent, name)
    before = getattr(type(parent), "before_fusion", None)
    if before is not None:
        parent.__class__ = before


def activation_of(parent: nn.Module, attribute: str) -> str:
    """The name of an activation that a last stage can apply; "" for any other attribute, or none."""
    value = getattr(parent, attribute, None)
    if isinstance(value, nn.GELU):
        return APPROXIMATIONS[value.approximate]
    if isinstance(value, nn.Module):
        return CLASSES.get(type(value).__name__, "")
    # a diffusers module that is projection and activation in one keeps the latter as a method
    if callable(value) and type(parent).__name__ == "GELU":
        return APPROXIMATIONS.get(getattr(parent, "approximate", ""), "")
    return ""


def put(parent: nn.Module, attribute: str, value: FusedActivation) -> None:
    """As a child where the activation was one; in front of a method otherwise."""
    if attribute in parent._modules:
        setattr(parent, attribute, value)
    else:
        vars(parent)[attribute] = value


def take_out(parent: nn.Module, attribute: str) -> None:
    """Undo `put`."""
    if vars(parent).pop(attribute, None) is None:
        child = parent._modules[attribute]
        if isinstance(child, FusedActivation):
            setattr(parent, attribute, child.activation)


@torch.no_grad()
def on_trial(function: Function, projection: BLRLinear) -> Tensor | None:
    """What a function makes of a random `[1, 2, K]`, in plain PyTorch; None if it wants something else."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 2, projection.in_features, generator=generator).to(projection.device, projection.dtype)
    try:
        with use_impl("reference"):
            return function(x)
    except Exception:
        # a forward with other arguments: it stays as it is
        return None


def alike(expected: Any, found: Any) -> bool:
    """Whether both are tensors that differ by no more than rounding."""
    if not all(isinstance(t, Tensor) for t in (expected, found)) or expected.shape != found.shape:
        return False
    scale = float(expected.abs().max())
    return bool((expected - found).abs().max() <= 8 * torch.finfo(expected.dtype).eps * scale)
