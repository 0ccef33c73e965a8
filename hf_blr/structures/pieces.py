"""A part of a matrix's rows or columns as a layer of its own: what each of several devices holds of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from hf_blr.structures.spec import BLRSpec

WHOLE = slice(None)


class Piece(NamedTuple):
    """Some rows or some columns of a matrix.

    spec: the sizes of the layer that they are.
    parts: {tensor: the part of each of its axes that this layer keeps}; what is not named is kept whole.
    """

    spec: BLRSpec
    parts: dict[str, tuple[slice, ...]]


def cut(features: int, blocks: int, start: int, stop: int) -> tuple[slice, slice]:
    """(blocks, features of each of them) that hold the features from start to stop.

    Raises:
        ValueError: unless these are whole blocks, or lie in one.
    """
    width = features // blocks
    first, last = start // width, -(-stop // width)
    if last - first == 1:
        return slice(first, last), slice(start - first * width, stop - first * width)
    if start % width or stop % width:
        raise ValueError(
            f"features {start} to {stop} of {features} are neither whole blocks nor a part of one, with {blocks} "
            f"blocks of {width}; split over a number of devices that divides {blocks}, or that {blocks} divides"
        )
    return slice(first, last), WHOLE


def length(part: slice, size: int) -> int:
    """How many of `size` numbers a part without steps takes."""
    start, stop, _ = part.indices(size)
    return stop - start


def scaled(part: slice, factor: int) -> slice:
    """The same part of an axis in which `factor` numbers stand for each."""
    return slice(part.start * factor, part.stop * factor)
