"""The tables of what each way to round gives, and of what whole compressions lose without each step."""

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


def steps_section() -> str:
    """One line for each step that was left out, and the conditions."""
    result = read_result(conditions.RESULTS / "rounding_steps.json")
    whole = {row["without"]: row for row in result["rows"] if row["structure"] == "dense"}
    factors = {row["without"]: row for row in result["rows"] if row["structure"] != "dense"}
    texts = list(result["rows"][0]["ppl"])
    lines = []
    for step in dict.fromkeys(row["without"] for row in result["rows"]):
        line = {"without": step}
        for name, rows in (("whole", whole), ("low-rank", factors)):
            for text in texts if rows else ():
                line[f"{name}, {text}"] = f"{rows[step]['ppl'][text]:.2f}" if step in rows else ""
        lines.append(line)
    first, fitted = result["rows"][0], result["fitted_to"]
    ratio = factors[first["without"]]["ratio"]
    return (
        f"{format_table(lines)}\n\n"
        f"{first['model']}, all in {first['format']} with groups of 64; low-rank at {ratio:.0%} of the parameters; "
        f"fitted to {fitted['calibration_tokens'] // 1000} thousand tokens of {fitted['calibration']}. "
        f"`python benchmarks/rounding_steps.py`; {conditions.machine(result['environment'])}."
    )
