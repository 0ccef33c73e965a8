"""Factors in bits as modules hand them to ops, and as registered ops take them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hf_blr.ops.library import contiguous_rows
from hf_blr.structures import FACTOR, structure_named


class InBits(NamedTuple):
    """One factor `[..., n, k]` as its module keeps it.

    codes: `[..., n, k]` float8_e4m3fn, or `[..., n, words]` int32, in which codes lie without gaps (`formats.words`).
    scale: `[..., n, groups]` bfloat16.
    bits: of a code.
    length: k.
    """

    codes: Tensor
    scale: Tensor
    bits: int
    length: int

    @property
    def shape(self) -> tuple[int, ...]:
        return *self.codes.shape[:-1], self.length


def codes_and_scales(
    structure: str, tensors: Sequence[Tensor | InBits], dtype: torch.dtype
) -> tuple[list[Tensor], list[Tensor | None], list[int], list[int]]:
    """(codes, scales, bits, lengths) of a layer's tensors, as the ops take them; numbers in dtype."""
    codes = [
        t.codes if isinstance(t, InBits) else contiguous_rows(t, dtype if kind == FACTOR else t.dtype)
        for t, kind in zip(tensors, structure_named(structure).spec.kinds.values(), strict=True)
    ]
    scales = [t.scale if isinstance(t, InBits) else None for t in tensors]
    bits = [t.bits if isinstance(t, InBits) else 0 for t in tensors]
    return codes, scales, bits, [t.length if isinstance(t, InBits) else t.shape[-1] for t in tensors]
