"""Arithmetic and traffic of dense layers, in numbers instead of bytes."""

from __future__ import annotations

from collections.abc import Iterator

from hf_blr.ops.rules.device import Device
from hf_blr.roofline.stage import Stage
from hf_blr.structures.spec import BLRSpec


def forward_stages(spec: BLRSpec, tokens: int, form: str, adds: bool, layers: int, chip: Device) -> Iterator[Stage]:
    yield Stage("product", spec.flops(tokens), tokens * (spec.in_features + spec.out_features) + spec.num_parameters)


def backward_stages(spec: BLRSpec, tokens: int, chip: Device) -> Iterator[Stage]:
    numbers = tokens * (spec.in_features + spec.out_features) + spec.num_parameters
    yield Stage("dw", spec.flops(tokens), numbers)
    yield Stage("dx", spec.flops(tokens), numbers)
