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
    """For matrices with rows of this length and so many outputs of all rows and blocks together."""
    if device == INTERPRETER:
        return RowsConfig(4, 16, 4)
    # each thread asks for 64 bytes at a time
    length = min(pow2(row), 2048 // itemsize)
    rows = max(1, 8192 // itemsize // length)
    # smaller tiles before idle multiprocessors
    while rows > 1 and outputs < rows * 4 * device.sms:
        rows //= 2
    return RowsConfig(rows, length, 4)
