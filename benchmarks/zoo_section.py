"""The table of architectures: what the data reached, what was fitted in order, and what came out."""

from __future__ import annotations

import json

import conditions

from hf_blr.markdown import format_table


def zoo_section() -> str:
    """One line for each architecture, and the conditions."""
    result = json.loads((conditions.RESULTS / "zoo.json").read_text())
    rows = [row for row in result["rows"] if "left_out" not in row]
    lines = [
        {
            "data": row["kind"],
            "model": row["model"],
            "layers": row["layers"],
            "reached": row["reached"],
            "sequential": row["sequential"],
            "chains": row["chains"],
            "statistics equal": "yes" if row["equal"] else "no",
            "error, sequential": f"{row['error_sequential']:.4f}",
            "error, one-shot": f"{row['error_one_shot']:.4f}",
        }
        for row in rows
    ]
    better = sum(row["error_sequential"] < row["error_one_shot"] for row in rows)
    left_out = "; ".join(f"{row['model']}: {row['left_out']}" for row in result["rows"] if "left_out" in row)
    largest = max(row["gram_error"] for row in rows)
    return (
        f"{format_table(lines)}\n\n"
        f"Random weights and data, 64 wide, low-rank at {result['ratio']:.0%}. Layers are linear ones; experts in 3-D "
        "parameters are compressed too. Statistics are compared with plain "
        "forwards over the samples one at a time, without padding, in float64; the largest relative difference is "
        f"{largest:.1e}. Errors are relative squared errors of the outputs on samples that nothing was fitted to, "
        f"smaller for the sequential fit in {better} of {len(rows)} lines. Left out: {left_out or 'nothing'}. "
        f"`python benchmarks/zoo.py`, {sum(row['seconds'] for row in rows):.0f} s; "
        f"{conditions.machine(result['environment'])}, transformers {result['environment']['transformers']}."
    )
