"""The table of tools."""

from __future__ import annotations

import json

import conditions
from tools import TOOLS

from hf_blr.bench.report.commits import rows_of


def tools_section() -> str:
    """One line for each tool, with its version, how many of its tests passed, and what does not work."""
    result = json.loads((conditions.RESULTS / "tools.json").read_text())
    rows = rows_of(result)
    lines = [
        {
            "tool": row["tool"],
            "tried with": f"{row['package']} {row['version']}",
            "tests passed": f"{row['passed']} of {row['passed'] + row['failed']}",
            "what does not work": TOOLS[row["tool"]].not_done,
            "commit": row["commit"],
        }
        for row in rows
    ]
    table, measured = conditions.table_of(lines, rows, result)
    return f"{table}\n\n`python benchmarks/tools.py` in an environment with each tool; {measured}."
