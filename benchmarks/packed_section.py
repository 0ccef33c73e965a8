"""Table of few tokens on layers in bits, beside dense layers."""

from __future__ import annotations

import statistics

from conditions import RESULTS, machine

from hf_blr.bench.report.files import read_result
from hf_blr.markdown import format_table


def packed_decode_section() -> str:
    """us of each layer."""
    result = read_result(RESULTS / "packed_decode_h200.json")
    layers = dict.fromkeys((row["in_features"], row["out_features"], row["tokens"]) for row in result["rows"])
    lines = []
    for layer in layers:
        rows = [r for r in result["rows"] if (r["in_features"], r["out_features"], r["tokens"]) == layer]
        line = {"us": f"{layer[0]} -> {layer[1]}, {tokens_of(layer[2])}"}
        lines.append(line | {name_of(row): f"{us(row):.1f}" for row in rows})
    numbers = ", ".join(
        f"{row['format']} {us(row):.0f} us by {'one kernel' if row['by'] == 'kernel' else 'PyTorch'}"
        for row in result["numbers"]
    )
    size = result["numbers"][0]
    return (
        f"{format_table(lines)}\n\n"
        f"{result['dtype']}; {result['protocol']}. "
        f"A factor {size['n']} x {size['k']} as numbers, groups of {size['group']}, at {size['commit']}: {numbers}. "
        f"Errors: {result['checks']}. {machine(result['environment'])}."
    )


def us(row: dict) -> float:
    return statistics.mean(row["us"])


def tokens_of(tokens: int) -> str:
    return f"{tokens} token" + "s" * (tokens > 1)


def name_of(row: dict) -> str:
    """dense, or low-rank of the rank that all rows of a layer have."""
    if row["rank"] is None:
        return "dense" if row["format"] == "plain" else "dense int4, PyTorch's"
    group = "" if row["group"] is None else f", groups of {row['group']}"
    return "low-rank" if row["format"] == "plain" else f"low-rank {row['format']}{group}"
