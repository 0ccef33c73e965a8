"""Damage that only checkpoints with factors in bits can have: to scales, to codes, and to what says their shape."""

from __future__ import annotations

from random import Random

import torch
from damage import Checkpoint, Damage, changed
from torch import Tensor

#: formats of the checkpoints that are damaged so; those of integers say a shape
FORMATS = ("int4", "int8", "fp8")
NOT_POSITIVE = (0.0, -1.0, float("nan"), float("inf"), -float("inf"))


def scale(checkpoint: Checkpoint, rng: Random) -> list[str]:
    def spoil(scales: Tensor) -> Tensor:
        scales.view(-1)[rng.randrange(scales.numel())] = rng.choice(NOT_POSITIVE)
        return scales

    return changed(checkpoint, ending_in(checkpoint, "_scale", rng), spoil)


def codes(checkpoint: Checkpoint, rng: Random) -> list[str]:
    def spoil(stored: Tensor) -> Tensor:
        cut, other = stored[:, :-1].contiguous(), stored.view(torch.uint8)
        return rng.choice([cut, other, stored.flatten()])

    names = ("_packed", ".u.weight", ".v.weight")
    return changed(checkpoint, ending_in(checkpoint, names, rng), spoil)


def shape(checkpoint: Checkpoint, rng: Random) -> list[str]:
    def spoil(sizes: Tensor) -> Tensor:
        sizes[rng.randrange(2)] += rng.choice([-1, 1, 10**9])
        return sizes

    return changed(checkpoint, ending_in(checkpoint, "_shape", rng), spoil)


def ending_in(checkpoint: Checkpoint, endings: str | tuple[str, ...], rng: Random) -> str:
    return rng.choice(sorted(key for key in checkpoint.tensors if key.endswith(endings)))


KINDS_OF_BITS: dict[str, Damage] = {
    "bits: a scale that is not positive": scale,
    "bits: codes of another shape or kind": codes,
    "bits: another shape said": shape,
}


def formats_for(kind: str) -> tuple[str, ...]:
    return FORMATS[:2] if KINDS_OF_BITS[kind] is shape else FORMATS
