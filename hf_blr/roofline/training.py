"""Arithmetic and traffic of a training step of one layer: the forward and every gradient."""

from __future__ import annotations

from collections.abc import Iterator

from hf_blr.ops.rules.device import H100, Device
from hf_blr.roofline.stage import Stage, in_bytes
from hf_blr.roofline.stages import stages
from hf_blr.structures import BLRSpec, structure_named


def training_stages(
    spec: BLRSpec, tokens: int, form: str = "hf_blr", itemsize: int = 2, chip: Device = H100
) -> list[Stage]:
    """The kernels of one forward and backward to x and every factor, more than 32 tokens.

    Args:
        spec: the layer's sizes.
        tokens: T.
        form: "dense" or "hf_blr".
        itemsize: bytes of a number.
        chip: the card whose kernels are counted.
    """
    if form not in ("dense", "hf_blr"):
        raise ValueError(f"form must be dense or hf_blr, got {form!r}")
    if form == "dense":
        backward = dense_backward(spec, tokens)
    else:
        backward = structure_named(spec.structure).load("backward_stages")(spec, tokens, chip)
    return stages(spec, tokens, form, itemsize, chip=chip) + in_bytes(backward, itemsize)


def dense_backward(spec: BLRSpec, tokens: int) -> Iterator[Stage]:
    t, k, n = tokens, spec.in_features, spec.out_features
    yield Stage("dx", 2 * t * k * n, t * (k + n) + k * n)
    yield Stage("dW", 2 * t * k * n, t * (k + n) + k * n)
