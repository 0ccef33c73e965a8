"""The activations of a model: which of them a last stage can apply, and what takes their place."""

from __future__ import annotations

from torch import Tensor, nn

from hf_blr.inference.trial import Function
from hf_blr.linear import BLRLinear

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
