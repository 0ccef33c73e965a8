"""The table of architectures and tools."""

from __future__ import annotations

import json

import conditions
from matrix import CHECKS, NEITHER, NOTHING, YES

from hf_blr.markdown import format_table


def matrix_section() -> str:
    """One line for each architecture, the failures in words below it, and the conditions."""
    result = json.loads((conditions.RESULTS / "matrix.json").read_text())
    rows = [row for row in result["rows"] if "left_out" not in row]
    failures: list[str] = []
    lines = []
    for row in rows:
        cells = {}
        for column in CHECKS:
            cells[column] = row[column]
            if row[column] not in (YES, NOTHING, NEITHER):
                failures.append(f"{row['model']}, {column}: {row[column]}")
                cells[column] = f"no ({len(failures)})"
        lines.append({"data": row["kind"], "model": row["model"], **cells})
    left_out = "; ".join(f"{row['model']}: {row['left_out']}" for row in result["rows"] if "left_out" in row)
    listed = "".join(f"{number}. {failure}\n" for number, failure in enumerate(failures, 1))
    return (
        f"{format_table(lines)}\n\n"
        f"{listed}{chr(10) * bool(listed)}"
        f"Random weights, 64 wide, {result['structure']} at {result['ratio']:.0%}. Left out: {left_out or 'nothing'}. "
        f"`python benchmarks/matrix.py`, {sum(row['seconds'] for row in rows):.0f} s; "
        f"{conditions.machine(result['environment'])}, transformers {result['environment']['transformers']}."
    )
