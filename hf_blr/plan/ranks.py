"""Ranks that kernels like: rows of factors that are as long as the rank begin at whole words or lines."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

from hf_blr.structures import FACTOR, BLRSpec


def lowered(spec: BLRSpec, suits: Callable[[BLRSpec], bool], lowest: int) -> BLRSpec:
    """The spec at the highest of its own rank and those below that suits, or as it is if none suits."""
    lower = (replace(spec, rank=rank) for rank in range(spec.rank, max(lowest, 1) - 1, -1))
    return next((candidate for candidate in lower if suits(candidate)), spec)


def has_even_rows(spec: BLRSpec) -> bool:
    """Whether rows of all factors that are multiplied by blocks are multiples of 16 bytes in 16 bits."""
    shapes = spec.shapes(FACTOR).items()
    return all(shape[-1] % 8 == 0 for name, shape in shapes if name not in spec.elementwise)


def in_multiples(spec: BLRSpec, multiple: int, suits: Callable[[BLRSpec], bool] = lambda _: True) -> BLRSpec:
    """The spec at the highest of `rank_step`'s multiples that suits, which costs at most a sixteenth of its rank."""
    step = rank_step(spec, multiple)
    return lowered(spec, lambda lower: lower.rank % step == 0 and suits(lower), -(-spec.rank * 15 // 16))


def rank_step(shape: BLRSpec, multiple: int) -> int:
    """The least rank whose multiples make rows that grow with the rank multiples of this many numbers.

    Monarch's grow by a number for each input block, so that less does.
    """
    one, two = (replace(shape, rank=rank).shapes(FACTOR) for rank in (1, 2))
    growth = (two[name][-1] - one[name][-1] for name in one if name not in shape.elementwise)
    return math.lcm(*(multiple // math.gcd(multiple, each) for each in growth if each > 0))
