"""Layers whose factors are kept in bits, run by kernels that read codes and scales; without gradients.

A structure that names kernels for them has two registered ops (`bits_library`). What neither takes is for `ops.linear`,
with factors as numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hf_blr.ops.cast import cast_rows
from hf_blr.ops.dispatch import check_impl, compute_dtype, current_impl, why_not_triton
from hf_blr.ops.library import contiguous_rows
from hf_blr.ops.rules.bits import FLOAT8, NUMBERS, CodeForm, missing, route
from hf_blr.structures import FACTOR, BLRSpec, structure_named


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


def route_in_bits(
    spec: BLRSpec, form: CodeForm, x: Tensor, numbers: Sequence[Tensor | None], impl: str | None = None
) -> str:
    """What a layer in bits runs on x `[..., K]`: `NUMBERS`, or the kernels `FLOAT8` or `PACKED`.

    Where a gradient is wanted, numbers: kernels for bits have no backward.

    Args:
        spec: the layer's sizes.
        form: of its factors.
        x: the input.
        numbers: the factors that are kept as numbers, and the bias.
        impl: of `dispatch.IMPLS`, or None for the default. "auto" takes kernels for bits on a GPU, in 16 bits.

    Raises:
        ValueError: for an unknown name.
        RuntimeError: if "triton" is asked for and the kernels that the rule names cannot run here; it says why.
    """
    impl = current_impl() if impl is None else check_impl(impl)
    if impl in ("reference", "dense"):
        return NUMBERS
    if impl == "auto" and (not x.is_cuda or compute_dtype(x) == torch.float32):
        return NUMBERS
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, *numbers)):
        return NUMBERS
    record = structure_named(spec.structure)
    found = route(spec, x.numel() // x.shape[-1], form, bool(record.float8), bool(record.packed))
    if found == NUMBERS:
        return found
    capability = torch.cuda.get_device_capability(x.device) if x.is_cuda else None
    reason = why_not_triton(x, numbers) or missing(found, capability)
    if reason is None:
        return found
    if impl == "triton":
        raise RuntimeError(
            f'impl="triton" cannot run {spec.structure} in {form.bits} bits: {reason}; use impl="auto" or "reference", '
            "which multiply the factors as numbers"
        )
    return NUMBERS


def linear_in_bits(
    found: str,
    structure: str,
    x: Tensor,
    tensors: Sequence[Tensor | InBits],
    bias: Tensor | None = None,
    activation: str = "",
    cast: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """activation(x W^T + bias) by kernels that read codes and scales.

    Args:
        found: of `route_in_bits`: `FLOAT8` or `PACKED`.
        structure: its name.
        x: `[..., K]`.
        tensors: factors and indices in the order of the structure's `kinds`; those in bits as `InBits`.
        bias: `[N]`, or none.
        activation: of `activations.ACTIVATIONS`.
        cast: of `cast_rows(x)`, where other layers on the same input share it.

    Returns:
        `[..., N]` in x's dtype, without a gradient.
    """
    dtype = compute_dtype(x)
    codes, scales, bits, lengths = codes_and_scales(structure, tensors, dtype)
    bias = None if bias is None else contiguous_rows(bias, dtype)
    if found == FLOAT8:
        rows, scale = cast or cast_rows(x)
        out = getattr(torch.ops.hf_blr, f"{structure}_float8")(rows, scale, codes, scales, bias, dtype, activation)
    else:
        rows = contiguous_rows(x.reshape(-1, x.shape[-1]), dtype)
        packed = getattr(torch.ops.hf_blr, f"{structure}_packed")
        out = packed(rows, codes, scales, bits, lengths, bias, activation)
    return out.view(*x.shape[:-1], out.shape[-1])


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
