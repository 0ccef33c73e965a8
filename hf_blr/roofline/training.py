"""Arithmetic and traffic of a training step of one layer: the forward and every gradient."""

from __future__ import annotations

from collections.abc import Iterator

from hf_blr.ops.triton.launch import ds_config, ds_group
from hf_blr.roofline.stages import HOPPER, Stage, in_bytes, size_of, stages
from hf_blr.structures import BLRSpec


def training_stages(spec: BLRSpec, tokens: int, form: str = "hf_blr", itemsize: int = 2) -> list[Stage]:
    """The kernels of one forward and backward to x and every factor, more than 32 tokens.

    Args:
        spec: the layer's sizes.
        tokens: T.
        form: "dense" or "hf_blr".
        itemsize: bytes of a number.
    """
    if form not in ("dense", "hf_blr"):
        raise ValueError(f"form must be dense or hf_blr, got {form!r}")
    backward = pivoted_backward if spec.structure == "pivoted" else blr_backward
    backward = dense_backward if form == "dense" else backward
    return stages(spec, tokens, form, itemsize) + in_bytes(backward(spec, tokens), itemsize)


def dense_backward(spec: BLRSpec, tokens: int) -> Iterator[Stage]:
    t, k, n = tokens, spec.in_features, spec.out_features
    yield Stage("dx", 2 * t * k * n, t * (k + n) + k * n)
    yield Stage("dW", 2 * t * k * n, t * (k + n) + k * n)


def pivoted_backward(spec: BLRSpec, tokens: int) -> Iterator[Stage]:
    """In numbers instead of bytes; y is kept by the forward, the inputs that c multiplies are gathered again."""
    t, k, n, r = tokens, spec.in_features, spec.out_features, spec.rank
    (u, c), y, rest = map(size_of, spec.factor_shapes().values()), t * r, t * (k - r)
    yield Stage("du", 2 * t * u, t * n + u, (y,))
    yield Stage("dy", 2 * t * u, t * n + u, (y,))
    yield Stage("dy c", 2 * t * c, c, (y, rest))
    yield Stage("scatter", 0, t * k + k, (y, rest), product=False)
    yield Stage("gather again", 0, t * k + k - r, (rest,), product=False)
    yield Stage("dc", 2 * t * c, c, (y, rest))


def blr_backward(spec: BLRSpec, tokens: int) -> Iterator[Stage]:
    """In numbers instead of bytes."""
    t, k, n, r = tokens, spec.in_features, spec.out_features, spec.rank
    b1, b2 = spec.num_blocks
    shapes = spec.factor_shapes()
    u, v = size_of(shapes["u"]), size_of(shapes["v"])
    y, z = (b1 * b2 * r * t,) * 2 if spec.structure == "monarch" else (b1 * r * t, b2 * r * t)
    if y > t * k:
        # kept by the forward only where it is no larger than x
        yield Stage("project again", 2 * t * v, t * k + v, (y,))
    if spec.structure == "blast":
        yield Stage("dz", 2 * t * u, t * n + u, (z,))
        yield from mix_backward(spec, t, y, z, size_of(shapes["s"]))
    else:
        if spec.structure == "monarch":
            yield Stage("swap blocks", 0, 0, (y, z), product=False)
        # Monarch takes one product for each input block, and each reads all of the outputs' gradient
        yield Stage("dy", 2 * t * u, (b1 if spec.structure == "monarch" else 1) * t * n + u, (y,))
    yield Stage("du", 2 * t * u, t * n + u, (z,))
    yield Stage("dv", 2 * t * v, t * k + v, (y,))
    yield Stage("dx", 2 * t * v, t * k + v, (y,))


def mix_backward(spec: BLRSpec, tokens: int, y: int, z: int, s: int) -> Iterator[Stage]:
    """z, dy and ds from dz and y: in one kernel while the sums of all pairs of blocks fit in registers."""
    b1, b2 = spec.num_blocks
    mix = 2 * tokens * s
    if ds_group(b1, b2) == b2 and not ds_config(b1, b2, HOPPER).dot:
        yield Stage("z, dy and ds", 3 * mix, 2 * s, (y, z, y, z), product=False)
        return
    yield Stage("z", mix, s, (y, z), product=False)
    yield Stage("dy", mix, s, (y, z), product=False)
    yield Stage("ds", mix, s, (y, z), product=False)
