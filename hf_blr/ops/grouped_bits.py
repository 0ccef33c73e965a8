"""Layers in bits that share their input: registered ops for packed factors at few tokens, and for float8 at many."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hf_blr.ops.bits import InBits, codes_and_scales
from hf_blr.ops.dispatch import compute_dtype
from hf_blr.ops.library import contiguous_rows, define_op
from hf_blr.structures import structure_named, structures
from hf_blr.structures.record import resolved

Layers = Sequence[Sequence["Tensor | InBits"]]
Biases = Sequence["Tensor | None"]


def grouped_in_bits(structure: str, x: Tensor, layers: Layers, biases: Biases) -> tuple[Tensor, ...]:
    """`ops.grouped_linear` of layers whose factors the kernels for few tokens read packed; without a gradient.

    Args:
        structure: one whose record names grouped kernels.
        x: `[..., K]`, T of 32 at most.
        layers: tensors of each, as in `bits.linear_in_bits`, all in one format.
        biases: of each `[N]`, or none at all.
    """
    out = call(structure, x, layers, biases, "", False)
    return out.split([width(layer[0]) for layer in layers], dim=-1)


def grouped_float8(
    structure: str,
    cast: tuple[Tensor, Tensor],
    shape: Sequence[int],
    dtype: torch.dtype,
    layers: Layers,
    biases: Biases,
) -> tuple[Tensor, ...]:
    """The outputs `[..., N]` in dtype of layers in float8 on one input; without a gradient.

    Args:
        structure: one whose record names `float8_grouped`.
        cast: of `cast.cast_rows(x)`.
        shape: of x `[..., K]`.
        dtype: of the outputs, and of biases.
        layers, biases: as in `grouped_in_bits`.
    """
    found = [codes_and_scales(structure, layer, dtype) for layer in layers]
    codes, scales = ([part for layer in named for part in layer] for named in list(zip(*found, strict=True))[:2])
    held = [None if bias is None else contiguous_rows(bias, dtype) for bias in biases]
    out = getattr(torch.ops.hf_blr, f"{structure}_float8_grouped")(*cast, codes, scales, held, dtype)
    return out.view(*shape[:-1], out.shape[-1]).split([width(layer[0]) for layer in layers], dim=-1)


def gated_in_bits(structure: str, x: Tensor, layers: Layers, biases: Biases, activation: str) -> Tensor:
    """`ops.gated_linear` of two such layers of one size."""
    return call(structure, x, layers, biases, activation, True)


def call(structure: str, x: Tensor, layers: Layers, biases: Biases, activation: str, gated: bool) -> Tensor:
    """The op `[..., N]` on rows that it can read."""
    dtype = compute_dtype(x)
    found = [codes_and_scales(structure, layer, dtype) for layer in layers]
    tensors, scales, bits, lengths = ([part for layer in named for part in layer] for named in zip(*found, strict=True))
    rows = contiguous_rows(x.reshape(-1, x.shape[-1]), dtype)
    held = [None if bias is None else contiguous_rows(bias, dtype) for bias in biases]
    op = getattr(torch.ops.hf_blr, op_name(structure))
    out = op(rows, tensors, scales, bits, lengths, held, activation, gated)
    return out.view(*x.shape[:-1], out.shape[-1])


def op_name(structure: str) -> str:
    return structure_named(structure).grouped.rpartition(".")[2] + "_packed"


def width(u: Tensor | InBits) -> int:
    """N, of a factor `[N, R]` or `[B2, Q, R]`."""
    return (u.codes if isinstance(u, InBits) else u).shape[:-1].numel()


def define_grouped_packed(structure: str) -> None:
    """Register the op: `<module's name>_packed(x, tensors, scales, bits, lengths, biases, activation, gated) -> out`.

    Arguments are those of `bits.define_packed`, of all layers one after the other; out `[T, sum of N]`, or gated, `[1,
    N]` of two layers. `activation` is the gate's.
    """
    record = structure_named(structure)

    def forward(*args: Any) -> Tensor:
        from hf_blr.ops.triton.packed import run_grouped

        return run_grouped(resolved(record.grouped), *args)

    def fake(x: Tensor, tensors: list[Tensor], *others: Any) -> Tensor:
        biases, gated = others[-3], others[-1]
        widths = [width(u) for u in tensors[:: len(tensors) // len(biases)]]
        return x.new_empty(x.shape[0], widths[0] if gated else sum(widths))

    define_op(
        f"{op_name(structure)}(Tensor x, Tensor[] tensors, Tensor?[] scales, int[] bits, int[] lengths, "
        "Tensor?[] biases, str activation, bool gated) -> Tensor",
        forward,
        fake,
    )


def define_grouped_float8(structure: str) -> None:
    """Register the op: `<name>_float8_grouped(x, x_scale, tensors, scales, biases, dtype) -> out`.

    x, x_scale and dtype as in `bits.define_float8`, tensors and scales of all layers one after the other; out `[T, sum
    of N]`.
    """
    record = structure_named(structure)

    def forward(x: Tensor, x_scale: Tensor, tensors: Any, scales: Any, biases: Any, dtype: torch.dtype) -> Tensor:
        each = len(tensors) // len(biases)
        by_name = [named[i::each] for named in (tensors, scales) for i in range(each)]
        found: Tensor = resolved(record.float8_grouped)(x, x_scale, *by_name, biases, dtype)
        return found

    def fake(x: Tensor, x_scale: Tensor, tensors: list[Tensor], scales: Any, biases: Any, dtype: Any) -> Tensor:
        total = sum(width(u) for u in tensors[:: len(tensors) // len(biases)])
        return x.new_empty(x.shape[0], total, dtype=dtype)

    define_op(
        f"{structure}_float8_grouped(Tensor x, Tensor x_scale, Tensor[] tensors, Tensor?[] scales, Tensor?[] biases, "
        "ScalarType dtype) -> Tensor",
        forward,
        fake,
    )


for _name in structures():
    if structure_named(_name).grouped:
        define_grouped_packed(_name)
    if structure_named(_name).float8_grouped:
        define_grouped_float8(_name)
