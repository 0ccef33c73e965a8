"""Layers in each format beside dense ones in bfloat16 and in float8."""

from __future__ import annotations

from conditions import RESULTS, table_of

from hf_blr.bench.report.commits import rows_of
from hf_blr.bench.report.files import read_result
from hf_blr.bench.report.lines import blocks_of, tokens_of, wide


def formats_section() -> str:
    """us of each layer in each format, and its speed over dense; a column for each number of tokens."""
    result = read_result(RESULTS / "layers_h200.json")
    rows = sorted(
        (row for row in rows_of(result) if row["impl"] in ("hf_blr", "cublas")), key=lambda row: row["tokens"]
    )
    layers = dict.fromkeys(row["layer"] for row in rows)
    lines = wide(
        sorted(rows, key=lambda row: list(layers).index(row["layer"])),
        lambda row: {
            "layer": row["layer"],
            "structure": row["structure"],
            "blocks": "" if row["blocks"] == [1, 1] else blocks_of(row),
            "rank": "" if row["structure"] == "dense" else row["rank"],
            "format": row["format"],
        },
        lambda row: {tokens_of(row): cell(row)},
    )
    columns = ["layer", "structure", "blocks", "rank", "format"]
    columns += dict.fromkeys(map(tokens_of, rows))
    table, where = table_of(lines, rows, result, columns)
    return (
        f"{table}\n\n"
        f"us; speed over dense in {result['dtype']}, and from 32 tokens on over dense in float8, its cast included, of "
        "layers in fp8. Half the parameters; fp8 and integers with a scale for each row. "
        f"{result['protocol']}. {where}."
    )


def cell(row: dict) -> str:
    if row["structure"] == "dense":
        return f"{row['us']:.1f}"
    speeds = [row["dense_us"] / row["us"]]
    if row["format"] == "fp8" and row["tokens"] > 32:
        speeds.append(row["dense_fp8_us"] / row["us"])
    return f"{row['us']:.1f} ({', '.join(f'{speed:.2f}x' for speed in speeds)})"
