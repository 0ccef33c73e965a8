"""How experts run: rows read their experts' matrices one by one, or in products of all rows of an expert."""

from __future__ import annotations

from typing import NamedTuple

from hf_blr.ops.rules.device import INTERPRETER, Device, pow2

#: pairs of a token and an expert up to which each reads its expert's factors for itself
FEW_ROWS = 128


class RowsConfig(NamedTuple):
    """Of `expert_rows_kernel`: rows of a matrix for each program, and the length read at a time."""

    rows: int
    length: int
    warps: int


def rows_config(row: int, outputs: int, itemsize: int, device: Device) -> RowsConfig:
    """For matrices with rows of as many columns, and so many outputs of all rows and blocks together."""
    if device == INTERPRETER:
        return RowsConfig(4, 16, 4)
    if row * itemsize > 1024 and outputs <= 64 * device.sms:
        # H200, us of 8 rows by (4, 1024) and (16, 256): 448 x 2048 5.6 and 7.5, 288 x 768 3.1 and 3.6
        return RowsConfig(4, min(pow2(row), 2048 // itemsize), 4)
    # of 128 rows by (16, 256), (8, 512) and (4, 1024): 448 x 2048 50, 50 and 54; 1536 x 448 40, 49; 2048 x 288 46, 62
    return RowsConfig(16, min(pow2(row), 512 // itemsize), 4)
