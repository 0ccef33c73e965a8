"""Arithmetic and traffic of Monarch layers, in numbers instead of bytes."""

from __future__ import annotations

import math
from collections.abc import Iterator

from hf_blr.ops.rules.device import Device
from hf_blr.ops.rules.monarch import monarch_route
from hf_blr.ops.rules.products import gemm_tiles
from hf_blr.roofline.stage import Stage
from hf_blr.structures.spec import BLRSpec


def forward_stages(spec: BLRSpec, tokens: int, form: str, adds: bool, layers: int, chip: Device) -> Iterator[Stage]:
    t, k, n, r = tokens, spec.in_features, spec.out_features, spec.rank
    (b1, b2), (p, q) = spec.num_blocks, spec.block_shape
    u, v = map(math.prod, spec.sizes().values())
    # y and z are of one size: every pair of blocks has its own rank
    y = b1 * b2 * r * t
    route = monarch_route(t, (b1, b2), (p, q, r), chip, adds, layers=layers)
    ours, float8 = form == "hf_blr", form == "float8"
    yield Stage("project", 2 * t * v, t * k + v, (y,), tiles=gemm_tiles(t, r, b1 * b2) if float8 else 0)
    if form in ("pytorch", "paper") or (ours and route.copied):
        yield Stage("swap blocks", 0, 0, (y, y), product=False)
    own_tiles = float8 or (ours and not route.few and (route.in_place or adds))
    yield Stage("expand", 2 * t * u, u + t * n, (y,), tiles=gemm_tiles(t, q, b2) if own_tiles else 0)
    if form == "pytorch":
        yield Stage("order outputs", 0, 2 * t * n, product=False)


def backward_stages(spec: BLRSpec, tokens: int, chip: Device) -> Iterator[Stage]:
    t, k, n = tokens, spec.in_features, spec.out_features
    b1, b2 = spec.num_blocks
    u, v = map(math.prod, spec.sizes().values())
    y = b1 * b2 * spec.rank * t
    if y > t * k:
        # kept by the forward only where it is no larger than x
        yield Stage("project again", 2 * t * v, t * k + v, (y,))
    yield Stage("swap blocks", 0, 0, (y, y), product=False)
    # one product for each input block, and each reads all of the outputs' gradient
    yield Stage("dy", 2 * t * u, b1 * t * n + u, (y,))
    yield Stage("du", 2 * t * u, t * n + u, (y,))
    yield Stage("dv", 2 * t * v, t * k + v, (y,))
    yield Stage("dx", 2 * t * v, t * k + v, (y,))
