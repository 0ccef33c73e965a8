"""Time at equal bytes: whole models with layers in bits, by the bits that a weight takes."""

from __future__ import annotations

from typing import Any

from conditions import RESULTS, table_of

from hf_blr.bench.report.commits import commits_of, rows_of
from hf_blr.bench.report.files import read_result
from hf_blr.bench.report.lines import grouped

#: whole models in many forms, and decoding in bits; of one card
FILES = "models_h200.json", "decode_h200.json"
#: {measurement: tokens} of one text
SIZES = {"prefill": 1024, "decode": 1}


def times_section() -> str:
    """One line for each form of the layers, large ones first, of each model that has one in fewer bits."""
    results = [read_result(RESULTS / file) for file in FILES]
    rows = [row for result in results for row in rows_of(result) if "error" not in row and row.get("batch") == 1]
    rows = [row for row in rows if SIZES.get(row["measurement"]) == row["tokens"]]
    models = grouped(rows, lambda row: row["model"])
    shown = {name: found for name, found in models.items() if any("/" in row["variant"] for row in found)} or models
    lines = [line for found in shown.values() for line in lines_of(found)]
    of_lines = [row for found in shown.values() for row in found]
    table, where = table_of(lines, of_lines, results[0])
    return f"{table}\n\nA prefill of 1024 tokens and one decoded token, of one text. {results[0]['protocol']}. {where}."


def lines_of(rows: list[dict]) -> list[dict[str, Any]]:
    """Those of one model; each measurement by its fastest form, fused or not."""
    dense = next((row for row in rows if row["variant"] == "dense"), None)
    if dense is None:
        return []
    lines = []
    for (layers, stored, _), found in grouped(rows, form_of).items():
        kept = found[0]["projection_parameters"] / dense["projection_parameters"]
        line: dict[str, Any] = {
            "model": dense["model"],
            "bits": f"{bits_of(found[0], dense):.2f}",
            "layers": layers,
            "kept": f"{100 * kept:.0f} %",
            "stored in": stored,
        }
        for measurement in SIZES:
            ms = [row["ms"] for row in found if row["measurement"] == measurement]
            line[f"{measurement}, ms"] = f"{min(ms):.2f}" if ms else ""
        lines.append(line | {"commit": commits_of(found)})
    return sorted(lines, key=lambda line: -float(line["bits"]))


def form_of(row: dict) -> tuple[str, str, int]:
    """(layers, format, numbers of the projections) of a row, whose variant has the first two before and after a slash;
    what is fused follows a plus, and what is kept an at sign.
    """
    layers, _, stored = row["variant"].partition("+")[0].partition("/")
    return layers.partition("@")[0].replace(":", " "), stored or "plain", row["projection_parameters"]


def bits_of(row: dict, dense: dict) -> float:
    """Stored for each number of the projections' dense matrices, of which the dense model stores 16."""
    rest = dense["weight_bytes"] - 2 * dense["projection_parameters"]
    return 8 * (row["weight_bytes"] - rest) / dense["projection_parameters"]
