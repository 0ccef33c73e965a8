"""Layers and whole models in formats of fewer bits, and training in float8, beside dense in bfloat16 and in float8."""

from __future__ import annotations

from statistics import geometric_mean

from conditions import RESULTS, machine, table_of
from float8_training import MODEL, PROTOCOL
from goals import as_table

from hf_blr.bench.report.commits import commits_of, rows_of
from hf_blr.bench.report.files import read_result
from hf_blr.bench.report.lines import blocks_of, tokens_of, wide
from hf_blr.markdown import format_table

FAMILIES = {"dense": "dense", "low_rank": "low-rank"}
#: {column: parts of a profile}
KINDS = {
    "products": ("products", "blr"),
    "attention": ("attention",),
    "elementwise": ("elementwise",),
    "idle": ("idle",),
}


def layers_section() -> str:
    """Single layers: microseconds, speed over dense in bfloat16, and over dense in float8."""
    result = read_result(RESULTS / "layers_h200.json")
    rows = [row for row in rows_of(result) if row["impl"] in ("hf_blr", "cublas")]

    def cell(row: dict) -> dict:
        rival = "" if row["dense_fp8_us"] is None else f", {row['dense_fp8_us'] / row['us']:.2f}x"
        return {tokens_of(row): f"{row['us']:.1f}, {row['speedup_vs_dense']:.2f}x{rival}"}

    def line(row: dict) -> dict:
        form = {"layer": row["layer"], "structure": row["structure"], "blocks": blocks_of(row), "rank": row["rank"]}
        return form | {"format": "bfloat16" if row["format"] == "plain" else row["format"]}

    order = sorted(rows, key=lambda row: (row["in_features"] * row["out_features"], row["in_features"]))
    table, where = table_of(wide(order, line, cell), rows, result)
    return (
        f"{table}\n\nus, speed over dense in bfloat16, and over dense in float8 with the cast of its input. "
        f"{result['protocol']}. {where}.\n\n{layer_goals(rows)}"
    )


def layer_goals(rows: list[dict]) -> str:
    """Geometric means over the shapes, and BLAST's of one shape."""

    def mean(structure: str, blocks: int, tokens: int, dense: str, shapes: int = 4) -> str:
        found = [
            row[dense] / row["us"]
            for row in rows
            if (row["structure"], row["format"], row["tokens"]) == (structure, "fp8", tokens)
            and row["blocks"] == [blocks, blocks]
            and (shapes == 4 or row["layer"] == "4096x4096")
        ]
        assert len(found) == shapes, (structure, blocks, tokens, found)
        return f"{geometric_mean(found):.2f}"

    lines = []
    for tokens, goals in ((4096, ("2.7", "1.6", "2.2", "1.4")), (1024, ("2.0", "1.25", "1.5", "1.1"))):
        for name, structure, blocks in (("low-rank", "low_rank", 1), ("Monarch 4x4", "monarch", 4)):
            lines += [
                (f"{name}, {tokens} tokens, all shapes", goals[0], mean(structure, blocks, tokens, "dense_us")),
                ("... over dense in float8", goals[1], mean(structure, blocks, tokens, "dense_fp8_us")),
            ]
        for blocks, goal in ((4, goals[2]), (16, goals[3])):
            name = f"BLAST {blocks}x{blocks}, 4096 -> 4096, {tokens} tokens"
            lines.append((name, goal, mean("blast", blocks, tokens, "dense_us", 1)))
    return f"In fp8, geometric means:\n\n{as_table(lines)}"


def groups_section() -> str:
    """Projections with one input, in float8 one by one and together."""
    result = read_result(RESULTS / "float8_h200.json")
    rows = [row for row in rows_of(result) if row["measured"] == "group"]

    def speeds(row: dict) -> str:
        return f"{row['us']:.0f}, {row['dense_us'] / row['us']:.2f}x, {row['dense_fp8_us'] / row['us']:.2f}x"

    lines = wide(
        rows,
        lambda row: {
            "group": row["group"],
            "tokens": row["tokens"],
            "dense": f"{row['dense_us']:.0f}",
            "dense in float8": f"{row['dense_fp8_us']:.0f}",
        },
        lambda row: {f"{'bfloat16' if row['format'] == 'plain' else 'fp8'}, {row['how']}": speeds(row)},
    )
    table, where = table_of(lines, rows, result)
    return (
        f"{table}\n\nus, speed over dense in bfloat16 and in float8; low-rank, half of each projection kept; casts of "
        "the input counted. Dense: the faster of one product for each projection and one with the concatenated "
        f"weights. Medians of CUDA-graph replays, L2 flushed before each. {where}."
    )


def training_section() -> str:
    """A training step of decoder blocks, and the errors of gradients in float8."""
    result = read_result(RESULTS / "float8_h200.json")
    rows = rows_of(result)
    steps = [row for row in rows if row["measured"] == "training step"]
    dense = next(row for row in steps if row["variant"] == "dense" and not row["float8"])
    lines = [
        {
            "": f"{FAMILIES[row['variant']]}, {'float8' if row['float8'] else 'bfloat16'}",
            "ms": f"{row['ms']:.2f}",
            "over dense": f"{dense['ms'] / row['ms']:.2f}x",
            "peak memory / dense": f"{row['peak_bytes'] / dense['peak_bytes']:.2f}",
        }
        for row in steps
    ]
    best = max(dense["ms"] / row["ms"] for row in steps if row["variant"] != "dense" and row["float8"])
    goal = as_table([("training step, low-rank in float8", "2.0", f"{best:.2f}")])
    size = f"{dense['blocks']} blocks of {MODEL}'s shape, {dense['batch']} x {dense['tokens']} tokens"
    errors = [error_line(row) for row in rows if row["measured"] == "training error"]
    where = machine(result["environment"] | {"commit": commits_of(steps)})
    return (
        f"{format_table(lines)}\n\n{goal}\n\n{size}; {PROTOCOL}. Dense in float8: one scale a tensor "
        "(`benchmarks/dense_float8.py`).\n\nErrors against float64 of a low-rank layer in float8, of random numbers "
        f"and tokens of very different size:\n\n{format_table(errors)}\n\n{where}."
    )


def error_line(row: dict) -> dict:
    sizes = f"{row['in_features']} x {row['out_features']}, {row['rank']}"
    line = {"in x out, rank": sizes, "tokens": row["tokens"]}
    for title, impl in (("", "auto"), (", multiplied in float32", "reference")):
        line |= {
            name + title: f"{error:.4f}" for name, error in zip(("output", "dx", "du", "dv"), row[impl], strict=True)
        }
    return line


def prefill_section() -> str:
    """Prefill of whole models whose factors are kept in fp8."""
    result = read_result(RESULTS / "models_h200.json")
    rows = [row for row in rows_of(result) if row["model"].startswith(MODEL) and row["measurement"] == "prefill"]
    by_variant = {row["variant"]: row for row in rows}
    dense, rival = by_variant["dense"], by_variant["dense/fp8"]
    lines = [
        {
            "variant": row["variant"],
            "ms": f"{row['ms']:.2f}",
            "over dense": f"{dense['ms'] / row['ms']:.2f}x",
            "over dense/fp8": f"{rival['ms'] / row['ms']:.2f}x",
            **{name: f"{sum(row['profile']['parts'][part] for part in parts):.2f}" for name, parts in KINDS.items()},
        }
        for row in rows
    ]
    ours = by_variant["low_rank/fp8+fused"]["ms"]
    goals = as_table(
        [
            ("prefill, low-rank in fp8", "2.1", f"{dense['ms'] / ours:.2f}"),
            ("... over dense/fp8", "1.35", f"{rival['ms'] / ours:.2f}"),
        ]
    )
    where = machine(result["environment"] | {"commit": commits_of(rows)})
    return (
        f"{format_table(lines)}\n\n{goals}\n\n{dense['model']}, {dense['batch']} x {dense['tokens']} tokens, half of "
        "each projection kept, compiled blocks in one CUDA graph; dense/fp8: the matrices in fp8, by cuBLAS behind a "
        f"cast that joins the norm before. ms of kernels by kind from a profile of one replay. {where}."
    )
