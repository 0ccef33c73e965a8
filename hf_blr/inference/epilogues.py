"""Activations that the projection before them applies, while its last stage stores: part of `hf_blr.fuse`.

A pass over an MLP's hidden layer costs as much as the projection itself on small models. Nothing here holds for good:
whatever takes a projection's place, or its training, brings the model's own activation back.
"""

from __future__ import annotations

from torch import nn

from hf_blr.experts import Experts
from hf_blr.inference.activations import FusedActivation, activation_of, put, take_out
from hf_blr.inference.gated import fuse_gate
from hf_blr.inference.trial import alike, on_trial
from hf_blr.linear import BLRLinear

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


def bring_back(parent: nn.Module) -> None:
    """Undo `fuse_activations` but for the projections' own part, which `BLRLinear.stand_alone` undoes."""
    for name, value in [*vars(parent).items(), *parent._modules.items()]:
        if isinstance(value, FusedActivation):
            take_out(parent, name)
    before = getattr(type(parent), "before_fusion", None)
    if before is not None:
        parent.__class__ = before
