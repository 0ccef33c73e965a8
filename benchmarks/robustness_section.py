"""The tables of damaged checkpoints and of long runs: how many were tried of each kind, and what became of them."""

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
        "Clear: an error that the command line prints as one line, and that names the damaged tensor, module, file, "
        f"field or argument. `python benchmarks/robustness.py --cases {total['tried']}`, "
        f"{result['seconds']:.0f} s, seed {result['seed']}; {conditions.machine(result['environment'])}, transformers "
        f"{result['environment']['transformers']}."
    )


def endurance_section() -> str:
    """One line for each long run, and the conditions."""
    result = json.loads((conditions.RESULTS / "endurance.json").read_text())
    lines = [
        {
            "what": row["what"],
            "times": row["tried"],
            "wrong": row["wrong"],
            "memory gained, MB": f"{row['grew_bytes'] / 1e6:.1f}" if "grew_bytes" in row else "",
            "seconds": f"{row['seconds']:.0f}",
        }
        for row in result["rows"]
    ]
    return (
        f"{format_table(lines)}\n\nWrong: other bits than the first time, or than a run that nothing stopped; after a "
        "full disk also an error that is no line saying so, and an old model that is gone. Memory: at the end, less "
        "that after a tenth. `python benchmarks/endurance.py`; "
        f"{conditions.machine(result['environment'])}, transformers {result['environment']['transformers']}."
    )
