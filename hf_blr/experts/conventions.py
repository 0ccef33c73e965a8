"""Which modules hold experts in 3-D parameters, and how these are laid out."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn


def holds_experts(module: nn.Module) -> bool:
    """Whether this is a module that Transformers lets other functions compute, by the attributes that they go by."""
    # of `transformers.integrations.moe.use_experts_implementation`; before there was `has_gate`, all had one
    marks = ("has_bias", "is_transposed", "_apply_gate", "num_experts")
    return all(hasattr(module, mark) for mark in marks)


def meets_all(module: nn.Module) -> bool:
    """Whether each expert of this module gets a row of every token: asked of a twin with small weights.

    So are Llama 4's, which are handed the tokens once for each expert, with zeros where a token did not choose it.
    """
    held = dict(module.named_parameters())
    if held.keys() != {"gate_up_proj", "down_proj"} or not hasattr(module, "num_experts"):
        return False
    up, down = held["gate_up_proj"].shape, held["down_proj"].shape
    if len(up) != 3 or len(down) != 3 or up != (down[0], down[2], 2 * down[1]):
        return False
    experts, hidden, inner = 2, 4, 3
    small = {"gate_up_proj": (experts, hidden, 2 * inner), "down_proj": (experts, inner, hidden)}
    numbers = {key: numbered(shape).cos() for key, shape in small.items()}
    # without the hooks and the memory of the module itself
    twin: Any = type(module).__new__(type(module))
    twin.__dict__.update(vars(module), num_experts=experts, hidden_size=hidden)
    twin._parameters = {key: nn.Parameter(value, False) for key, value in numbers.items()}
    x = numbered((5 * experts, hidden)).sin()
    gate, value = (x.view(experts, -1, hidden) @ numbers["gate_up_proj"]).chunk(2, dim=-1)
    try:
        wanted = ((value * twin.act_fn(gate)) @ numbers["down_proj"]).view(-1, hidden)
        out = type(module).forward(twin, x)
    except Exception:
        return False
    return isinstance(out, torch.Tensor) and out.shape == wanted.shape and torch.allclose(out, wanted)


def numbered(shape: tuple[int, ...]) -> torch.Tensor:
    """0, 1, 2, ... in float64, also where a model is being made without memory."""
    return torch.arange(math.prod(shape), device="cpu", dtype=torch.float64).view(shape)
