"""Registered ops of the kernels for bits: products in float8, and few tokens on packed factors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from hf_blr.ops.library import define_op
from hf_blr.structures.record import Structure


def define_float8(record: Structure) -> None:
    """Register `hf_blr::<name>_float8(x, x_scale, tensors, scales, bias, dtype, activation) -> out`.

    x `[T, K]` float8 times x_scale `[T]` float32 is the input; tensors and scales are of the structure's `kinds`, with
    None for the scale of what is kept as numbers; out `[T, N]` in dtype.
    """

    def forward(*args: Any) -> Any:
        return record.load("float8").forward(*args)

    def fake(x: Tensor, scale: Tensor, tensors: list[Tensor], scales: Any, bias: Any, dtype: Any, *_: Any) -> Tensor:
        return x.new_empty(x.shape[0], tensors[0].shape[:-1].numel(), dtype=dtype)

    define_op(
        f"{record.name}_float8(Tensor x, Tensor x_scale, Tensor[] tensors, Tensor?[] scales, Tensor? bias, "
        "ScalarType dtype, str activation) -> Tensor",
        forward,
        fake,
    )


def define_packed(record: Structure) -> None:
    """Register `hf_blr::<name>_packed(x, tensors, scales, bits, lengths, bias, activation) -> out`.

    x `[T, K]`, T of 32 at most; tensors and scales as in `define_float8`, integers in 32-bit words; bits of a code, 0
    for what is kept as numbers, and lengths of a row in numbers, for each of the tensors; out `[T, N]` in x's dtype.
    """

    def forward(*args: Any) -> Any:
        return record.load("packed")(*args)

    def fake(x: Tensor, tensors: list[Tensor], *_: Any) -> Tensor:
        return x.new_empty(x.shape[0], tensors[0].shape[:-1].numel())

    define_op(
        f"{record.name}_packed(Tensor x, Tensor[] tensors, Tensor?[] scales, int[] bits, int[] lengths, Tensor? bias, "
        "str activation) -> Tensor",
        forward,
        fake,
    )


def define_bits(record: Structure) -> None:
    """Register the ops of the kernels for bits that a record names."""
    defined: list[tuple[str, Callable[[Structure], None]]] = [
        (record.float8, define_float8),
        (record.packed, define_packed),
    ]
    for path, define in defined:
        if path:
            define(record)
