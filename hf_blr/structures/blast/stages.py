"""Arithmetic and traffic of BLAST layers, in numbers instead of bytes."""

from __future__ import annotations

import math
from collections.abc import Iterator

from hf_blr.ops.rules.blast import blast_route
from hf_blr.ops.rules.device import Device
from hf_blr.ops.rules.mix import ds_config, ds_group, mixes_along_t
from hf_blr.ops.rules.products import fused_mix_config, gemm_tiles
from hf_blr.roofline.stage import Stage
from hf_blr.structures.spec import BLRSpec


def forward_stages(spec: BLRSpec, tokens: int, form: str, adds: bool, layers: int, chip: Device) -> Iterator[Stage]:
    t, k, n, r = tokens, spec.in_features, spec.out_features, spec.rank
    (b1, b2), (p, q) = spec.num_blocks, spec.block_shape
    u, s, v = map(math.prod, spec.sizes().values())
    y, z = b1 * r * t, b2 * r * t
    project, mix, expand = 2 * t * v, 2 * t * s, 2 * t * u
    route = blast_route(t, (b1, b2), (p, q, r), chip, adds, layers=layers)
    if form == "float8":
        yield Stage("project", project, t * k + v, (y,), tiles=gemm_tiles(t, r, b1))
        # s, and its products with v's scales, are of 16 bits
        yield Stage("weights of the mix", 0, 2 * s, (2 * s,), product=False)
        yield Stage("mix", mix, 2 * s, (y, z), product=False)
        yield Stage("expand", expand, u + t * n, (z,), tiles=gemm_tiles(t, q, b2))
        return
    if form != "hf_blr":
        yield Stage("project", project, t * k + v, (y,))
        if form == "paper":
            yield Stage("permute y", 0, 0, (y, y), product=False)
        yield Stage("mix", mix, s, (y, z), product=mixes_along_t(b1, b2))
        if form == "paper":
            yield Stage("permute z", 0, 0, (z, z), product=False)
        yield Stage("expand", expand, u + t * n, (z,))
        if form == "pytorch":
            yield Stage("order outputs", 0, 2 * t * n, product=False)
        return
    if route.few and not route.stacked:
        yield Stage("project and mix", project + mix, t * k + v + s, (z,))
    else:
        yield Stage("project", project, t * k + v, (y,))
    if route.fused:
        tile = fused_mix_config(b1, 2, chip)
        columns, rows = b2 * -(-q // tile.bn), -(-t // tile.bt)
        again = columns * rows * r * (b1 * tile.bt + tile.bn)
        mixes = expand + columns * 2 * b1 * t * r
        yield Stage("mix and expand", mixes, s + u + t * n, (y,), again, tiles=columns * rows)
        return
    if route.stacked or not route.few:
        yield Stage("mix", mix, s, (y, z), product=False)
    tiles = gemm_tiles(t, q, b2) if adds and not route.few else 0
    yield Stage("expand", expand, u + t * n, (z,), tiles=tiles)


def backward_stages(spec: BLRSpec, tokens: int, chip: Device) -> Iterator[Stage]:
    t, k, n, r = tokens, spec.in_features, spec.out_features, spec.rank
    b1, b2 = spec.num_blocks
    u, s, v = map(math.prod, spec.sizes().values())
    y, z, mix = b1 * r * t, b2 * r * t, 2 * t * s
    if y > t * k:
        # kept by the forward only where it is no larger than x
        yield Stage("project again", 2 * t * v, t * k + v, (y,))
    yield Stage("dz", 2 * t * u, t * n + u, (z,))
    if ds_group(b1, b2) == b2 and not ds_config(b1, b2, chip).dot:
        # in one kernel while the sums of all pairs of blocks fit in registers
        yield Stage("z, dy and ds", 3 * mix, 2 * s, (y, z, y, z), product=False)
    else:
        yield Stage("z", mix, s, (y, z), product=False)
        yield Stage("dy", mix, s, (y, z), product=False)
        yield Stage("ds", mix, s, (y, z), product=False)
    yield Stage("du", 2 * t * u, t * n + u, (z,))
    yield Stage("dv", 2 * t * v, t * k + v, (y,))
    yield Stage("dx", 2 * t * v, t * k + v, (y,))
