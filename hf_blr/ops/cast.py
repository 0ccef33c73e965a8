"""The input of products in float8: each token scaled so that its norm is the largest number of e4m3, and rounded.

A token of that norm overflows nowhere, and by Cauchy-Schwarz neither does what a product makes of it, whatever the
token: the scales of y and z are known before they are computed. Float8 rounds relative to each number, so that being
far below the largest costs nothing: each of 4096 alike features is 7, and e4m3 goes down to 2^-6 with all its bits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hf_blr.ops.dispatch import compute_dtype
from hf_blr.ops.library import contiguous_rows, define_op

FLOAT8 = torch.float8_e4m3fn
LARGEST = torch.finfo(FLOAT8).max
#: a token of zeros takes any scale
SMALLEST_NORM = 2.0**-100


def cast_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """(rows `[T, K]` float8, scale `[T]` float32) of x `[..., K]`, with rows times scale nearest to x.

    Compiled code gets PyTorch's own operations, which join the kernel that makes x, such as a norm; all other a kernel.
    """
    rows = contiguous_rows(x.reshape(-1, x.shape[-1]), compute_dtype(x))
    if torch.compiler.is_compiling() or not rows.is_cuda:
        return plain_cast(rows)
    found: tuple[Tensor, Tensor] = torch.ops.hf_blr.cast_rows(rows)
    return found


def plain_cast(rows: Tensor) -> tuple[Tensor, Tensor]:
    """`cast_rows` of x `[T, K]` in plain PyTorch."""
    wide = rows.float()
    scale = wide.square().sum(-1).sqrt().clamp_min(SMALLEST_NORM) / LARGEST
    return (wide / scale[:, None]).to(FLOAT8), scale


def cast_kernel(rows: Tensor) -> tuple[Tensor, Tensor]:
    from hf_blr.ops.triton.cast import cast_rows

    found: tuple[Tensor, Tensor] = cast_rows(rows, LARGEST, SMALLEST_NORM)
    return found


def cast_fake(rows: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(rows, dtype=FLOAT8), rows.new_empty(rows.shape[0], dtype=torch.float32)


define_op("cast_rows(Tensor x) -> (Tensor, Tensor)", cast_kernel, cast_fake)
