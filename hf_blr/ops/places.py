"""Layers in bits at few tokens, multiplied place by place: one registered op for one layer or several on one input.

The inputs come to the op in the order of places. They are put into it by plain PyTorch, which compiled code merges into
what makes them, a norm for example.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_blr.ops.dispatch import compute_dtype
from hf_blr.ops.in_bits import InBits, codes_and_scales
from hf_blr.ops.library import contiguous_rows, define_op
from hf_blr.ops.rules.packed import CHUNK, multiplies_by_places, padded
from hf_blr.structures import structure_named
from hf_blr.structures.record import Structure


def takes_places(structure: str, tensors: Sequence[Tensor | InBits]) -> bool:
    """Whether a layer that kernels read packed is multiplied place by place.

    Never on a GPU that is not NVIDIA's, whose assembler the kernels speak.
    """
    if not structure_named(structure).places or torch.version.hip is not None:
        return False
    return all(multiplies_by_places(t.length, t.scale.shape[-1], t.bits) for t in tensors if isinstance(t, InBits))


def linear_in_places(
    structure: str,
    x: Tensor,
    layers: Sequence[Sequence[Tensor | InBits]],
    biases: Sequence[Tensor | None],
    activation: str = "",
    gated: bool = False,
) -> Tensor:
    """activation(x W^T + bias) of several layers `[..., sum of N]`, without a gradient.

    Args:
        structure: one of `takes_places`.
        x: `[..., K]`, T of 32 at most.
        layers: tensors of each, as in `bits.linear_in_bits`, all in one format.
        biases: of each `[N]`, or none at all.
        activation: of `activations.ACTIVATIONS`.
        gated: of two layers of one size, activation(the first's) * the second's `[..., N]`.
    """
    dtype = compute_dtype(x)
    found = [codes_and_scales(structure, layer, dtype) for layer in layers]
    tensors, scales, bits, lengths = ([part for layer in named for part in layer] for named in zip(*found, strict=True))
    rows = to_places(x.reshape(-1, x.shape[-1]).to(dtype), 32 // bits[0])
    held = [None if bias is None else contiguous_rows(bias, dtype) for bias in biases]
    op = getattr(torch.ops.hf_blr, f"{structure}_places")
    out: Tensor = op(rows, tensors, scales, bits, lengths, held, activation, gated)
    return out.view(*x.shape[:-1], out.shape[-1])


def to_places(x: Tensor, per: int) -> Tensor:
    """x `[T, K]` in the order in which words of `per` numbers meet it, `[T, chunks * per * CHUNK]`, zero behind K."""
    x = F.pad(x, (0, padded(x.shape[-1], per) - x.shape[-1]))
    return x.view(len(x), -1, CHUNK, per).transpose(-1, -2).reshape(len(x), -1)


def define_places(record: Structure) -> None:
    """Register `hf_blr::<name>_places(x, tensors, scales, bits, lengths, biases, activation, gated) -> out`.

    x `[T, padded K]` as `to_places` gives it; the others as of `linear_in_places`, of all layers one after the other;
    out `[T, sum of N]`, or gated, `[T, N]`.
    """

    def forward(*args: Any) -> Any:
        return record.load("places")(*args)

    def fake(x: Tensor, tensors: list[Tensor], *others: Any) -> Tensor:
        biases, gated = others[-3], others[-1]
        widths = [len(u) for u in tensors[:: len(tensors) // len(biases)]]
        return x.new_empty(len(x), widths[0] if gated else sum(widths))

    define_op(
        f"{record.name}_places(Tensor x, Tensor[] tensors, Tensor[] scales, int[] bits, int[] lengths, "
        "Tensor?[] biases, str activation, bool gated) -> Tensor",
        forward,
        fake,
    )
