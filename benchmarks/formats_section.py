"""Whole models in formats of fewer bits, and training in float8, beside dense models in 16 bits and in float8."""

from __future__ import annotations

from conditions import RESULTS, machine
from goals import as_table

from hf_blr.bench.report.files import read_result
from hf_blr.markdown import format_table

FAMILIES = {"dense": "dense", "low_rank": "low-rank"}


def training_section() -> str:
    """A training step of decoder blocks, and the errors of gradients in float8."""
    result = read_result(RESULTS / "float8_training_h200.json")
    steps = [row for row in result["rows"] if row["measured"] == "step"]
    errors = [row for row in result["rows"] if row["measured"] == "error"]
    dense = next(row for row in steps if row["variant"] == "dense" and not row["float8"])
    lines = [
        {
            "": f"{FAMILIES[row['variant']]}, {'float8' if row['float8'] else 'bfloat16'}",
            "ms": f"{row['ms']:.2f}",
            "over dense": f"{dense['ms'] / row['ms']:.2f}x",
            "peak / dense": f"{row['peak_bytes'] / dense['peak_bytes']:.2f}",
        }
        for row in steps
    ]
    best = max(dense["ms"] / row["ms"] for row in steps if row["variant"] != "dense" and row["float8"])
    goal = as_table([("training step, low-rank in float8", "2.0", f"{best:.2f}")])
    where = f"{dense['blocks']} blocks of {dense['model']}'s shape, {dense['batch']} x {dense['tokens']} tokens"
    return (
        f"{format_table(lines)}\n\n{goal}\n\n{where}; {result['protocol']}. Dense in float8: one scale a tensor "
        "(`benchmarks/dense_float8.py`).\n\nErrors against float64 of a low-rank layer in float8, of random numbers, "
        f"tokens of very different size:\n\n{format_table([error_line(row) for row in errors])}\n\n"
        f"{machine(result['environment'])}."
    )


def error_line(row: dict) -> dict:
    names = ("output", "dx", "du", "dv")
    sizes = f"{row['in_features']} x {row['out_features']}, {row['rank']}"
    line = {"in x out, rank": sizes, "tokens": row["tokens"]}
    for title, impl in (("", "auto"), (", multiplied in float32", "reference")):
        line |= {name + title: f"{error:.4f}" for name, error in zip(names, row[impl], strict=True)}
    return line


def models_in_formats_section() -> str:
    """Prefill and decoding of whole models, and what their weights take."""
    result = read_result(RESULTS / "models_formats_h200.json")
    rows = [row for row in result["rows"] if "error" not in row]
    dense = {row["measurement"]: row for row in rows if row["variant"] == "dense"}
    rival = next(row for row in rows if (row["measurement"], row["variant"]) == ("prefill", "dense/fp8"))
    lines, found = [], {}
    for row in sorted(rows, key=lambda row: (row["measurement"] == "decode", row["variant"])):
        ms, before = time_of(row), dense[row["measurement"]]
        found[row["measurement"], row["variant"].removesuffix("+fused")] = time_of(before) / ms
        lines.append(
            {
                "": f"{row['measurement']}, {row['batch']} x {row['tokens']}",
                "variant": row["variant"],
                "ms": f"{ms:.2f}",
                "over dense": f"{time_of(before) / ms:.2f}x",
                "over dense/fp8": f"{time_of(rival) / ms:.2f}x" if row["measurement"] == "prefill" else "",
                "weights, GB": f"{row['weight_bytes'] / 1e9:.2f}",
                "weights / dense": f"{row['weight_bytes'] / before['weight_bytes']:.3f}",
                "commit": row["commit"][:7],
            }
        )
    weights = next(row for row in rows if row["variant"].startswith("low_rank/int4"))["weight_bytes"]
    float8 = found["prefill", "low_rank/fp8"]
    goals = as_table(
        [
            ("prefill, low-rank in fp8", "2.1", f"{float8:.2f}"),
            ("... over dense/fp8", "1.35", f"{float8 / found['prefill', 'dense/fp8']:.2f}"),
            ("decoding one text, low-rank in fp8", "2.5", f"{found['decode', 'low_rank/fp8']:.2f}"),
            ("... in int4", "3.0", f"{found['decode', 'low_rank/int4']:.2f}"),
            ("weights, half kept in int4, of dense", "0.25", f"{weights / dense['decode']['weight_bytes']:.3f}"),
        ]
    )
    return (
        f"{format_table(lines)}\n\n{goals}\n\n{rows[0]['model']}, {result['dtype']} beside the formats, half of each "
        "projection kept, one scale a row. dense/fp8: the matrices in fp8, by cuBLAS behind a cast that joins the norm "
        f"before. Decoding: the graph's own time, without `generate()`'s part. {result['protocol']}. "
        f"{machine(result['environment'])}."
    )


def time_of(row: dict) -> float:
    """ms on the device."""
    return row.get("graph_ms", row["ms"])
