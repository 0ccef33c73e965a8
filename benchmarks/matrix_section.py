"""The table of architectures and tools."""

from __future__ import annotations

import json
import re

import conditions
from matrix import CHECKS, NEITHER, NOTHING, YES

from hf_blr.bench.report.commits import rows_of


def matrix_section() -> str:
    """One line for each architecture, why some failed, and the conditions."""
    result = json.loads((conditions.RESULTS / "matrix.json").read_text())
    rows = [row for row in rows_of(result) if "left_out" not in row]
    causes: dict[str, list[str]] = {}
    lines = []
    for row in rows:
        cells = {}
        for column in CHECKS:
            cells[column] = row[column]
            if row[column] not in (YES, NOTHING, NEITHER):
                # up to its advice, and whatever number the layer has
                cause = f"{column}: {re.sub(r'[0-9]+', '0', row[column].partition(';')[0])}"
                causes.setdefault(cause, []).append(row["model"])
                cells[column] = f"no ({list(causes).index(cause) + 1})"
        lines.append({"data": row["kind"], "model": row["model"], **cells, "commit": row["commit"]})
    left_out = "; ".join(f"{row['model']}: {row['left_out']}" for row in result["rows"] if "left_out" in row)
    listed = "".join(f"{i}. {', '.join(models)}: {cause}\n" for i, (cause, models) in enumerate(causes.items(), 1))
    table, measured = conditions.table_of(lines, rows, result)
    return (
        f"{table}\n\n"
        f"{listed}{chr(10) * bool(listed)}"
        f"Random weights, 64 wide, {result['structure']} at {result['ratio']:.0%}. Left out: {left_out or 'nothing'}. "
        f"`python benchmarks/matrix.py`, {sum(row['seconds'] for row in rows):.0f} s; "
        f"{measured}, transformers {result['environment']['transformers']}."
    )
