"""The table of damaged checkpoints: how many were tried of each kind, and what became of them."""

from __future__ import annotations

import json

import conditions

from hf_blr.markdown import format_table


def robustness_section() -> str:
    """One line for each kind of damage, their sums, and the conditions."""
    result = json.loads((conditions.RESULTS / "robustness.json").read_text())
    rows = result["rows"]
    counts = [key for key in rows[0] if key != "kind"]
    total = {"kind": "all", **{key: sum(row[key] for row in rows) for key in counts}}
    return (
        f"{format_table([*rows, total])}\n\n"
        f"Clear: an error that the command line prints as one line, and that names the damaged tensor, module, file or "
        f"field. `python benchmarks/robustness.py --cases {total['tried']}`, {result['seconds']:.0f} s, seed "
        f"{result['seed']}; {conditions.machine(result['environment'])}, transformers "
        f"{result['environment']['transformers']}."
    )
