"""Tables of perplexities: the demo's and the quality benchmark's."""

from __future__ import annotations

import json

from conditions import RESULTS, commits_of, machine
from summaries import quality_summary, square_blast

from hf_blr.bench.report.files import read_result
from hf_blr.cli.table import format_table


def demo_section() -> str:
    """Perplexities of the demo, and the conditions."""
    result = json.loads((RESULTS / "demo.json").read_text())
    on_gpu = json.loads((RESULTS / "demo_h200.json").read_text())
    found = ", ".join(f"{row['model']} {row['perplexity']:.2f}" for row in on_gpu["rows"])
    return (
        f"{format_table(result['rows'])}\n\n{result['conditions']} `{result['command']}`, {result['seconds']:.0f} s in "
        f"all; {machine(result['environment'])}, Python {result['environment']['python']}, "
        f"transformers {result['environment']['transformers']}. `seconds` are those of the fit. "
        f"On a GPU the same command takes {on_gpu['seconds']:.0f} s ({machine(on_gpu['environment'])}, Python "
        f"{on_gpu['environment']['python']}, whose documentation is another: {found})."
    )


def quality_section() -> str:
    """Perplexities of the quality benchmark, in short."""
    result = read_result(RESULTS / "quality.json")
    return f"{quality_summary(result['rows'])}\n\n{quality_conditions(result)}"


def square_blast_section() -> str:
    """The most accurate structure beside low-rank."""
    result = read_result(RESULTS / "quality.json")
    return f"{square_blast(result['rows'])}\n\n{quality_conditions(result)}"


def quality_rows_section() -> str:
    """All rows of the quality benchmark, one line for each method and size, a column for each text."""
    result = read_result(RESULTS / "quality.json")
    lines: dict[tuple, dict] = {}
    for row in result["rows"]:
        blocks = "" if row["blocks"] is None else "{} x {}".format(*row["blocks"])
        key = row["ratio"], row["structure"], blocks, row["method"]
        line = {"kept": f"{100 * row['ratio']:.0f} %", "structure": row["structure"], "blocks": blocks}
        line = lines.setdefault(key, {**line, "method": row["method"], "MB": row["bytes"] / 1e6})
        line[f"{row['dataset']} ppl"] = row["ppl"]
        line["seconds"] = row["fit_seconds"]
    rows = [lines[key] for key in sorted(lines, key=lambda key: (-key[0], str(key)))]
    # the texts of all rows: a run that was stopped may not have scored each
    texts = dict.fromkeys(f"{row['dataset']} ppl" for row in result["rows"])
    columns = ["kept", "structure", "blocks", "method", "MB", *texts, "seconds"]
    return f"{format_table(rows, columns)}\n\n{quality_conditions(result)}"


def quality_conditions(result: dict) -> str:
    models = ", ".join(dict.fromkeys(row["model"] for row in result["rows"]))
    shared = max(row.get("statistics_seconds", 0.0) for row in result["rows"])
    return (
        f"{models}; {result['protocol']}. Seconds are those of the fit, or of the refinement, and missing where two "
        f"runs shared the GPU; the statistics that all fits share took {shared:.0f} s. "
        f"{machine(result['environment'], commits_of(result['rows']))}."
    )
