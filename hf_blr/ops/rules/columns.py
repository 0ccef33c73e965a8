"""Kernels that move columns."""

from __future__ import annotations

from dataclasses import dataclass

from hf_blr.ops.rules.device import INTERPRETER, Device


@dataclass(frozen=True)
class ColumnConfig:
    """Tiles over tokens and columns of a kernel that moves columns."""

    bt: int
    bc: int
    warps: int


def column_config(device: Device) -> ColumnConfig:
    """For `columns_kernel`.

    Long tiles of one token each: 1024 x 4096, H100, us of the gather and of the scatter 11.5 and 13.1, with 8 tokens to
    a tile of 256 columns 12.3 and 25.6; a copy of x takes 10.3.
    """
    if device == INTERPRETER:
        return ColumnConfig(4, 16, 4)
    return ColumnConfig(1, 1024, 4)


def swap_config(device: Device) -> ColumnConfig:
    """For `swap_blocks_kernel`: 8192 tokens, 4 x 4 blocks of rank 256, 51.6 us, H100; 1 x 1024 51.5, 8 x 256 52.4."""
    return ColumnConfig(4, 16, 4) if device == INTERPRETER else ColumnConfig(4, 512, 4)
