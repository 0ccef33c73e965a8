"""The table of what each step of rounding gives."""

from __future__ import annotations

import conditions

from hf_blr.bench.report.files import read_result
from hf_blr.markdown import format_table


def rounding_section() -> str:
    """One line for each structure, format and way to round, and the conditions."""
    result = read_result(conditions.RESULTS / "rounding.json")
    lines = [
        {
            "layers": row["structure"],
            "format": row["format"],
            "rounded by": row["way"] or "not rounded",
            "bits a weight": f"{row['bits']:.2f}",
            **{f"KL, {text}": f"{value:.4f}" for text, value in row["kl"].items()},
            **{f"perplexity, {text}": f"{value:.2f}" for text, value in row["ppl"].items()},
        }
        for row in result["rows"]
    ]
    models = ", ".join(dict.fromkeys(row["model"] for row in result["rows"]))
    return (
        f"{format_table(lines)}\n\n"
        f"{models}, {result['blocks']} blocks; {result['protocol']}. Low-rank at {result['ratio']:.0%} of the "
        f"parameters, groups of {result['group']}, fitted to {result['fitted_to']}. `python benchmarks/rounding.py`; "
        f"{conditions.machine(result['environment'])}, transformers {result['environment']['transformers']}."
    )
