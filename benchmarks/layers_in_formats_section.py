"""Single layers in formats of fewer bits on an H200, beside dense in bfloat16 and in float8, and as predicted."""

from __future__ import annotations

from statistics import geometric_mean
from typing import Any

from conditions import RESULTS, table_of

from hf_blr.bench.peaks import predictions
from hf_blr.bench.report.commits import rows_of
from hf_blr.bench.report.files import read_result
from hf_blr.bench.report.layer_tables import off_by
from hf_blr.bench.report.lines import blocks_of, grouped, tokens_of, wide
from hf_blr.bench.rivals import RIVALS
from hf_blr.formats import PLAIN
from hf_blr.markdown import format_table
from hf_blr.ops.rules.few_tokens import FEW_TOKENS
from hf_blr.roofline.devices import DEVICES

FILE = "layers_h200.json"
#: implementations of this package and of PyTorch's products; those of other libraries have lines of their own
OURS = ("hf_blr", "cublas")
RIVAL_NAMES = {name for makers in RIVALS.values() for name in makers}


def layers_section() -> str:
    """Microseconds, speed over dense in bfloat16 and in float8, geometric means over the sizes."""
    result = read_result(RESULTS / FILE)
    rows = [row for row in rows_of(result) if row["impl"] in (*OURS, *RIVAL_NAMES)]
    order = sorted(rows, key=lambda row: (row["in_features"] * row["out_features"], row["in_features"]))
    table, where = table_of(wide(order, line_of, cell_of), rows, result)
    return (
        f"{table}\n\nus, speed over dense in bfloat16, and over dense in float8 with the cast of its input; half of "
        "the parameters kept, in ranks that are cut so that 128 divides them where a sixteenth of them is enough for "
        f"that; of low-rank those that 16 divides too. {result['protocol']}. {where}.\n\n"
        f"Geometric means over the sizes of a structure in fp8, over dense in bfloat16 and in float8:\n\n{means(rows)}"
    )


def line_of(row: dict) -> dict[str, Any]:
    by = "" if row["impl"] in OURS else f", {row['impl']}"
    line = {"layer": row["layer"], "structure": row["structure"] + by, "blocks": blocks_of(row), "rank": row["rank"]}
    return line | {"format": "bfloat16" if row["format"] == PLAIN.name else row["format"]}


def cell_of(row: dict) -> dict[str, str]:
    rival = "" if row["dense_fp8_us"] is None else f", {row['dense_fp8_us'] / row['us']:.2f}x"
    return {tokens_of(row): f"{row['us']:.1f}, {row['speedup_vs_dense']:.2f}x{rival}"}


def means(rows: list[dict]) -> str:
    fp8 = [row for row in rows if row["format"] == "fp8" and row["structure"] != "dense" and row["tokens"] > FEW_TOKENS]
    lines: dict[tuple[str, str, str], dict[str, Any]] = {}
    for (structure, blocks, tokens), found in grouped(
        fp8, lambda row: (row["structure"], blocks_of(row), row["tokens"])
    ).items():
        # the larger ranks of layers that have two are those that were not cut
        both = {"cut": of_least_rank(found), "not cut": of_least_rank(found, -1)}
        for ranks, group in both.items() if both["cut"] != both["not cut"] else [("cut", found)]:
            line = lines.setdefault((structure, blocks, ranks), {"structure": structure, "blocks": blocks})
            line |= {"ranks": ranks, "sizes": len(group)}
            over = (geometric_mean(row[dense] / row["us"] for row in group) for dense in ("dense_us", "dense_fp8_us"))
            line[f"{tokens} tokens"] = ", ".join(f"{speed:.2f}x" for speed in over)
    return format_table(list(lines.values()))


def of_least_rank(rows: list[dict], sign: int = 1) -> list[dict]:
    """Of each layer at each number of tokens the row of the least rank; with sign -1 of the largest."""
    found: dict[tuple[str, int], dict] = {}
    for row in sorted(rows, key=lambda row: sign * row["rank"]):
        found.setdefault((row["layer"], row["tokens"]), row)
    return [found[key] for key in sorted(found)]


def predicted_section() -> str:
    """How many of these layers the roofline predicts within a quarter."""
    result = read_result(RESULTS / FILE)
    found = predictions(rows_of(result), DEVICES["H200-measured"])
    groups = grouped(found, lambda row: (row["format"], row["tokens"]))
    lines = [
        {"format": name} | off_by(str(tokens), "layers", group) for (name, tokens), group in sorted(groups.items())
    ]
    table, where = table_of(lines, found, result)
    return f"{table}\n\nOf the layers above that run as numbers or in float8. {where}."
