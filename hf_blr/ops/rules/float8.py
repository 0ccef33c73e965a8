"""Products of float8: tiles, and of the cast before them."""

from __future__ import annotations

from hf_blr.ops.rules.columns import ColumnConfig
from hf_blr.ops.rules.device import INTERPRETER, Device, pow2
from hf_blr.ops.rules.products import SMALLEST_GEMM, GemmConfig, fit_gemm


def float8_config(tokens: int, n: int, device: Device) -> GemmConfig:
    """For `float8_gemm_kernel` with n outputs in each block."""
    if device == INTERPRETER:
        return SMALLEST_GEMM
    return fit_gemm(GemmConfig(128 if tokens > 64 else 64, 128 if n > 64 else 64, 128, 4, 3), 1, device)


def cast_config(k: int, device: Device) -> ColumnConfig:
    """For `cast_rows_kernel`, of which a program takes one token whole, some columns at a time."""
    if device == INTERPRETER:
        return ColumnConfig(1, 16, 4)
    return ColumnConfig(1, min(4096, pow2(k)), 4 if k <= 8192 else 8)
