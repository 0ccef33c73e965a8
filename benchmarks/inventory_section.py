"""Which result file was measured when, on what, and at which commit."""

from __future__ import annotations

import json

import conditions

from hf_blr.markdown import format_table


def inventory_section() -> str:
    """One line for each result file, in the order of their dates."""
    files = {path.name: json.loads(path.read_text())["environment"] for path in conditions.RESULTS.glob("*.json")}
    rows = [
        {
            "date": where["date"],
            "file": f"`results/{name}`",
            "device": where["device"],
            "torch": where["torch"],
            "commit": where["commit"][:7],
        }
        for name, where in sorted(files.items(), key=lambda item: (item[1]["date"], item[0]))
    ]
    return f"{format_table(rows)}\n\nThe commit is that of the last run into the file; rows may name earlier ones."
