"""Arithmetic and traffic of low-rank layers, in numbers instead of bytes."""

from __future__ import annotations

from collections.abc import Iterator

from hf_blr.ops.rules.device import Device
from hf_blr.ops.rules.few_tokens import FEW_TOKENS
from hf_blr.ops.rules.float8 import last_tiles
from hf_blr.ops.rules.products import gemm_tiles
from hf_blr.roofline.stage import Stage
from hf_blr.structures.spec import BLRSpec


def forward_stages(spec: BLRSpec, tokens: int, form: str, adds: bool, layers: int, chip: Device) -> Iterator[Stage]:
    t, k, n, r = tokens, spec.in_features, spec.out_features, spec.rank
    u, v, y = n * r, r * k, t * r
    first = last = 0
    if form == "float8":
        first, last = gemm_tiles(t, r, 1), last_tiles(t, n, chip)
    elif adds and t > FEW_TOKENS:
        last = gemm_tiles(t, n, 1)
    yield Stage("project", 2 * t * v, t * k + v, (y,), tiles=first)
    yield Stage("expand", 2 * t * u, u + t * n, (y,), tiles=last)


def backward_stages(spec: BLRSpec, tokens: int, chip: Device) -> Iterator[Stage]:
    t, k, n, r = tokens, spec.in_features, spec.out_features, spec.rank
    u, v, y = n * r, r * k, t * r
    if y > t * k:
        # kept by the forward only where it is no larger than x
        yield Stage("project again", 2 * t * v, t * k + v, (y,))
    yield Stage("dy", 2 * t * u, t * n + u, (y,))
    yield Stage("du", 2 * t * u, t * n + u, (y,))
    yield Stage("dv", 2 * t * v, t * k + v, (y,))
    yield Stage("dx", 2 * t * v, t * k + v, (y,))
