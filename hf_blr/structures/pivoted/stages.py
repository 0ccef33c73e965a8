"""Arithmetic and traffic of pivoted layers, in numbers instead of bytes."""

from __future__ import annotations

from collections.abc import Iterator

from hf_blr.ops.rules.device import Device
from hf_blr.ops.rules.float8 import last_tiles
from hf_blr.ops.rules.products import gemm_tiles
from hf_blr.roofline.stage import Stage
from hf_blr.structures.spec import BLRSpec


def forward_stages(spec: BLRSpec, tokens: int, form: str, adds: bool, layers: int, chip: Device) -> Iterator[Stage]:
    t, k, n, r = tokens, spec.in_features, spec.out_features, spec.rank
    u, c, y, rest = n * r, r * (k - r), t * r, t * (k - r)
    if form == "hf_blr" and t == 1:
        yield Stage("gather and project", 2 * t * c, t * k + c + k, (y,))
    else:
        # every feature of x is read and written once more, and the product adds to the pivots
        yield Stage("gather", 0, t * k + k, (y, rest), product=False, gathered=t * k)
        yield Stage("project", 2 * t * c, c, (y, rest, y), tiles=gemm_tiles(t, r, 1) if form == "float8" else 0)
    yield Stage("expand", 2 * t * u, u + t * n, (y,), tiles=last_tiles(t, n, chip) if form == "float8" else 0)


def backward_stages(spec: BLRSpec, tokens: int, chip: Device) -> Iterator[Stage]:
    """y is kept by the forward, the inputs that c multiplies are gathered again."""
    t, k, n, r = tokens, spec.in_features, spec.out_features, spec.rank
    u, c, y, rest = n * r, r * (k - r), t * r, t * (k - r)
    yield Stage("du", 2 * t * u, t * n + u, (y,))
    yield Stage("dy", 2 * t * u, t * n + u, (y,))
    yield Stage("dy c", 2 * t * c, c, (y, rest))
    yield Stage("scatter", 0, t * k + k, (y, rest), product=False)
    yield Stage("gather again", 0, t * k + k - r, (rest,), product=False)
    yield Stage("dc", 2 * t * c, c, (y, rest))
