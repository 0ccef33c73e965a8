"""Layers that multiply in float8 while they train."""

from __future__ import annotations

from torch import nn

from hf_blr.linear import blr_modules
from hf_blr.ops.float8_training import emulates, why_not_float8
from hf_blr.ops.rules.bits import LEAST_FLOAT8


def open_float8(model: nn.Module) -> tuple[list[str], str]:
    """Lets layers whose factors are numbers multiply in float8 in training mode, until `close_float8`.

    Returns:
        (the layers, in words what else there is to know or "").

    Raises:
        ValueError: if no layer of the model can, with the reason.
    """
    layers = blr_modules(model)
    reasons = {name: why_not_float8(layer.spec) for name, layer in layers.items() if layer.factors()}
    opened = [name for name, reason in reasons.items() if reason is None]
    if not opened:
        why = next(iter(reasons.values()), "its factors are kept in bits")
        raise ValueError(f"no layer of {type(model).__name__} can train in float8: {why}; leave train_float8 out")
    for name in opened:
        layers[name].float8 = True
    said = []
    if len(opened) < len(layers):
        refused = {name: reason for name, reason in reasons.items() if reason is not None}
        why = ", ".join(dict.fromkeys(refused.values())) or "factors are kept in bits"
        said.append(f"{len(layers) - len(opened)} layers train in the dtype of the model: {why}")
    if emulates(next(iter(layers[opened[0]].factors().values()))):
        wanted = "a GPU of compute capability {}.{}".format(*LEAST_FLOAT8)
        said.append(f"float8 numbers are multiplied in float32, which saves no time; it takes {wanted} to save any")
    return opened, "; ".join(said)


def close_float8(model: nn.Module) -> None:
    """Lets all layers multiply in the dtype of the model again."""
    for layer in blr_modules(model).values():
        layer.float8 = False
