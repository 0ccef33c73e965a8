"""A factor in bits as numbers, in one pass of a kernel."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hf_blr.ops.bits import InBits
from hf_blr.ops.dispatch import DTYPES, why_not_triton
from hf_blr.ops.library import define_op


def numbers_in_bits(factor: InBits, dtype: torch.dtype) -> Tensor | None:
    """The factor `[..., n, k]` in this dtype by a kernel, in one pass; None where it takes no such factor.

    The same numbers bit for bit as `formats.Codes.numbers` gives in several passes.
    """
    float8 = factor.codes.dtype == torch.float8_e4m3fn
    words = factor.bits in (4, 8) and not (float8 and factor.length % 4)
    if not words or dtype not in DTYPES or not factor.codes.is_cuda or why_not_triton(factor.scale, ()) is not None:
        return None
    return torch.ops.hf_blr.numbers(*factor, dtype)


def define_numbers() -> None:
    """Register `hf_blr::numbers(codes, scale, bits, length, dtype) -> factor`; codes and scale as in `InBits`."""

    def run(codes: Tensor, scale: Tensor, *args: Any) -> Tensor:
        from hf_blr.ops.triton.numbers import numbers

        return numbers(codes.contiguous(), scale.contiguous(), *args)

    def fake(codes: Tensor, scale: Tensor, bits: int, length: int, dtype: torch.dtype) -> Tensor:
        return codes.new_empty(*codes.shape[:-1], length, dtype=dtype)

    define_op("numbers(Tensor codes, Tensor scale, int bits, int length, ScalarType dtype) -> Tensor", run, fake)


define_numbers()
