"""Tables of single layers, of projections that run together, and of how well the roofline predicts."""

from __future__ import annotations

import statistics

from hf_blr.bench.report.commits import commits_of
from hf_blr.bench.report.lines import blocks_of, grouped, storage_of, tokens_of, wide
from hf_blr.formats import PLAIN


def layer_lines(rows: list[dict]) -> list[dict]:
    """One line for each layer and form: dense's microseconds or the speed over it, a column for each number of tokens.

    Of the package's own kernels and of dense; other implementations have no line. Where some factors are kept in bits,
    a column names the format; dense in bits is a speed over dense too.
    """
    shown = [row for row in rows if row["impl"] in ("hf_blr", "cublas")]
    in_bits = any(storage_of(row) != PLAIN.name for row in shown)

    def head(row: dict) -> dict:
        line = {key: row[key] for key in ("layer", "structure")} | {"blocks": blocks_of(row), "rank": row["rank"]}
        return line | ({"format": storage_of(row)} if in_bits else {})

    def cell(row: dict) -> dict:
        dense = (row["structure"], storage_of(row)) == ("dense", PLAIN.name)
        return {tokens_of(row): row["us"] if dense else f"{row['speedup_vs_dense']:.2f}x"}

    return wide(shown, head, cell)


def group_lines(rows: list[dict]) -> list[dict]:
    """Projections with one input: speed over dense one by one -> together, a column for each number of tokens."""
    pairs = grouped(
        (row for row in rows if row["structure"] != "dense"),
        lambda row: (row["group"], row["structure"], blocks_of(row), row["tokens"]),
    )
    both = [{row["how"]: row for row in pair} for pair in pairs.values()]
    return wide(
        sorted((pair["together"] | {"apart": pair["apart"]} for pair in both), key=lambda row: row["tokens"]),
        lambda row: {"group": row["group"], "structure": row["structure"], "blocks": blocks_of(row)},
        lambda row: {
            tokens_of(row): f"{row['apart']['speedup_vs_dense']:.2f}x -> {row['speedup_vs_dense']:.2f}x",
        },
    )


def prediction_lines(layers: list[dict], models: list[dict]) -> list[dict]:
    """How far predictions were off: layers by number of tokens, whole models by measurement.

    Args:
        layers: rows of `peaks.predictions`.
        models: rows of `model_peaks.model_predictions`.
    """
    by_tokens = sorted(layers, key=lambda row: (row["direction"], row["tokens"]))
    groups = grouped(by_tokens, lambda row: tokens_of(row).replace(" tokens", ""))
    lines = [off_by(name, "layers", group) for name, group in groups.items()]
    found = grouped(models, lambda row: row["measurement"])
    for measurement, name in (("prefill", "whole models, prefill"), ("decode", "whole models, decoding")):
        if measurement in found:
            lines.append(off_by(name, "rows", found[measurement]))
    return lines


def off_by(name: str, what: str, rows: list[dict]) -> dict:
    """The line of rows that have a `deviation`, predicted / measured - 1."""
    off = [abs(row["deviation"]) for row in rows]
    within = f"{sum(value <= 0.25 for value in off)} of {len(off)} {what}"
    median = f"{100 * statistics.median(off):.0f} %"
    return {"tokens": name, "within 25 %": within, "median off": median, "commit": commits_of(rows)}
