"""The activations that a layer's last stage can apply to what it stores, by name."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

#: {name: PyTorch's function}; "" is none
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "": lambda x: x,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "relu": F.relu,
    "silu": F.silu,
}


def activated(x: Tensor, activation: str, gate: Tensor | None = None) -> Tensor:
    """activation(x), or activation(gate) x."""
    return ACTIVATIONS[activation](x) if gate is None else ACTIVATIONS[activation](gate) * x


def check_activation(activation: str) -> str:
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {tuple(ACTIVATIONS)}, got {activation!r}")
    return activation
