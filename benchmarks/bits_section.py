"""Accuracy at equal bytes: one line for each structure and format, by the bits that a weight takes."""

from __future__ import annotations

from statistics import geometric_mean
from typing import Any

from conditions import RESULTS, table_of
from protocol import TURNED
from text_ratio_sections import complete, conditions, described, mean_ratio, method_of, ratio

from hf_blr.bench.report.commits import commits_of, rows_of
from hf_blr.bench.report.files import read_result
from hf_blr.bench.report.lines import grouped, label_of, variant_of
from hf_blr.bench.report.quality_tables import score, stored_in

FILE, TIMES = "bits_h200.json", "models_h200.json"
#: {measurement: tokens} of the milliseconds beside the perplexities, of one text
SIZES = {"prefill": 1024, "decode": 1}

Line = dict[str, Any]


def bits_section() -> str:
    """Every method on the model that lies on no file's grid: for each calibration set those of most bits first."""
    result = read_result(RESULTS / FILE)
    rows = [row for row in rows_of(result) if turned(row)]
    texts = texts_of(rows)
    lines = sorted(bits_lines(rows, texts), key=lambda line: (line["fitted to"], -line["bits"], line["mean"]))
    timed, said = times()
    for line in lines:
        line |= timed.get(line["timed as"], {})
    columns = ["bits", "layers", "kept", "stored in", "method", "fitted to", *texts, "mean"]
    columns += dict.fromkeys(column for line in lines for column in timed.get(line["timed as"], {}))
    table, where = table_of([shown(line) for line in lines], rows, result, columns)
    return f"{table}\n\n{said} {conditions(result, rows)} {where}."


def bases_section() -> str:
    """Plain factors in both bases: what a structure loses where its blocks are those of a random basis."""
    result = read_result(RESULTS / FILE)
    rows = [row for row in rows_of(result) if row["format"] == "plain" and row["structure"]]
    both = {name: {place_of(row) for row in rows if turned(row) == name} for name in (False, True)}
    rows = [row for row in rows if place_of(row) in both[False] & both[True]]
    texts = texts_of(rows)
    lines = sorted(bits_lines(rows, texts), key=lambda line: (line["layers"], line["basis"]))
    table, where = table_of([shown(line) for line in lines], rows, result, ["layers", "kept", "basis", *texts, "mean"])
    return f"{table}\n\n{where}."


def turned(row: dict) -> bool:
    return row["model"].endswith(TURNED)


def place_of(row: dict) -> tuple:
    """What a row measures, in whichever basis."""
    return method_of({**row, "model": None})


def texts_of(rows: list[dict]) -> list[str]:
    return list(dict.fromkeys(row["dataset"] for row in rows))


def bits_lines(rows: list[dict], texts: list[str]) -> list[Line]:
    """A line for each method and calibration set that was scored on all texts: each perplexity, and its ratio to dense.

    "mean" is the geometric mean of the ratios.
    """
    lines = []
    for found in grouped(rows, method_of).values():
        runs = complete(found, texts)
        if not runs:
            continue
        row = runs[0][0]
        line: Line = {
            "bits": row["bits"],
            "layers": label_of(row) or "dense",
            "kept": f"{100 * row['kept']:.0f} %",
            "stored in": stored_in(row),
            "method": "" if row["method"] == "dense" else row["method"],
            "fitted to": described(row),
            "basis": "turned" if turned(row) else "as it is",
            "mean": geometric_mean([mean_ratio(run) for run in runs]),
            "timed as": (variant_of(row) or "dense", row["format"], row["ratio"]),
            "commit": commits_of([each for run in runs for each in run]),
        }
        for i, text in enumerate(texts):
            of_text = [run[i] for run in runs]
            ppl = geometric_mean([each["ppl"] for each in of_text])
            line[text] = f"{score(ppl)} ({geometric_mean(map(ratio, of_text)):.2f}x)"
        lines.append(line)
    return lines


def shown(line: Line) -> Line:
    return line | {"bits": f"{line['bits']:.2f}", "mean": f"{line['mean']:.3f}"}


def times() -> tuple[dict[tuple, Line], str]:
    """{(variant, format, ratio): milliseconds} of the model that most formats were timed on, and what they are."""
    rows = [
        row
        for row in read_result(RESULTS / TIMES)["rows"]
        if "error" not in row and row["batch"] == 1 and SIZES.get(row["measurement"]) == row["tokens"]
    ]
    models = grouped(rows, lambda row: row["model"])
    model = max(models, key=lambda name: len({row.get("format") for row in models[name]}))
    found: dict[tuple, Line] = {}
    for row in models[model]:
        key = row["variant"].removesuffix("+fused"), row.get("format", "plain"), row.get("ratio", 1.0)
        cell, column = found.setdefault(key, {}), f"{row['measurement']}, ms"
        cell[column] = f"{min(row['ms'], float(cell.get(column, 'inf'))):.2f}"
    return found, f"Milliseconds are those of {model}: a text of {SIZES['prefill']} tokens, and one decoded token."
