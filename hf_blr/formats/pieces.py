"""The stored tensors of some rows or columns of a layer, cut out of those of the whole."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from hf_blr.formats.bits import Bits
from hf_blr.formats.codes import Codes
from hf_blr.formats.plain import Format
from hf_blr.structures import BLRSpec
from hf_blr.structures.pieces import WHOLE, Piece


def tensors_of(
    storage: Format, spec: BLRSpec, piece: Piece, name: str, stored: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """{state-dict key: tensor} that the layer of the piece keeps of one factor or index.

    Args:
        storage: the format of both layers.
        spec: of the whole layer.
        piece: of `spec.outputs` or `spec.inputs`.
        name: of the factor or index.
        stored: {state-dict key: tensor} of all that the whole layer keeps of it.

    Raises:
        ValueError: if the piece begins or ends inside a group of numbers that share a scale.
    """
    parts = piece.parts.get(name)
    if parts is None:
        return dict(stored)
    if not isinstance(storage, Bits) or name not in storage.in_bits(spec):
        return {key: tensor[parts] for key, tensor in stored.items()}
    shape = spec.shapes()[name]
    codes = storage.codes({key.removeprefix(f"{name}."): tensor for key, tensor in stored.items()}, shape)
    of_scales = (*parts[:-1], groups(storage, name, parts[-1], shape[-1]))
    cut = Codes(codes.values[parts], codes.scale[of_scales])
    return {f"{name}.{leaf}": tensor for leaf, tensor in storage.laid_out(cut).items()}


def groups(storage: Bits, name: str, part: slice, size: int) -> slice:
    """The scales of a part of a row of `size` numbers."""
    start, stop, _ = part.indices(size)
    if storage.group_size is None or (start, stop) == (0, size):
        return WHOLE
    if start % storage.group_size or stop % storage.group_size:
        raise ValueError(
            f"numbers {start} to {stop} of the rows of {name} cut through groups of {storage.group_size} that share a "
            "scale; split over fewer devices, or store the layer with a smaller group_size"
        )
    return slice(start // storage.group_size, stop // storage.group_size)
