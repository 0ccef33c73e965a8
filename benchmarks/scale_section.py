"""The table of whole runs against the size of the model, and the line that the sizes lie on."""

from __future__ import annotations

import json
from statistics import linear_regression

import conditions

from hf_blr.markdown import format_table

GB = 1e9
#: what tells runs apart whose numbers lie on one line, and whose lines differ by their fits alone
SETTINGS = ("device", "model", "tokens", "max_memory", "structure")
BUT_FITS = SETTINGS[:-1]
#: {column: the field of a row}
PEAKS = {
    "peak GB": "peak_bytes",
    "without mapped files": "peak_anonymous_bytes",
    "GPU GB": "peak_gpu_bytes",
}


def scale_section(name: str = "scale.json") -> str:
    """One line for each run, lines for whole models that are computed from two sizes or more, and the conditions."""
    result = json.loads((conditions.RESULTS / name).read_text())
    rows = result["rows"]
    lines = [line_of(row) for row in rows]
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in SETTINGS), []).append(row)
    for group in groups.values():
        whole = group[0]["of_blocks"]
        if len({row["blocks"] for row in group}) > 1 and all(row["blocks"] < whole for row in group):
            lines.append({**line_of(extended(group, whole)), "measured": "computed"})
        elif all(row["blocks"] < whole for row in group):
            same = [other for other in rows if all(other[key] == group[0][key] for key in BUT_FITS)]
            if (
                row := with_other_fits(group[0], [each for each in same if each["structure"] == "low_rank"])
            ) is not None:
                lines.append({**line_of(row), "measured": "computed"})
    kills = [
        f"A run of {row['blocks']} blocks of {row['model']}, {row['tokens']} tokens, that was killed after "
        f"{row['killed_after']:.0f} s, with half of its layers finished, took {row['seconds_after_kill']:.0f} s more; "
        f"one that nobody killed takes {seconds_of(row):.0f} s. The files are "
        f"{'the same to the last bit' if row['same_bits'] else 'not the same to the last bit'}.\n\n"
        for row in rows
        if "same_bits" in row
    ]
    return (
        f"{format_table(lines)}\n\n{''.join(kills)}"
        "Computed: on the straight line through the sizes above it; of a structure with one size, on low-rank's line "
        "with its own fits. Without a limit no peak, since statistics make it in a larger model. "
        f"`benchmarks/scale.py`; {conditions.machine(result['environment'])}, transformers "
        f"{result['environment']['transformers']}."
    )


def cpu_section() -> str:
    return scale_section()


def gpu_section() -> str:
    return scale_section("scale_h200.json")


def line_of(row: dict) -> dict:
    """What the table says of one run."""
    return {
        "model": row["model"],
        "structure": row["structure"],
        "blocks": f"{row['blocks']} of {row['of_blocks']}",
        "parameters": f"{row['parameters'] / GB:.2f} B",
        "tokens": row["tokens"],
        "max_memory": row["max_memory"] or "",
        "RAM GB": f"{row['ram_bytes'] / GB:.1f}" if "ram_bytes" in row else "",
        "seconds": f"{seconds_of(row):.0f}",
        **{column: f"{row[field] / GB:.1f}" if row.get(field) else "" for column, field in PEAKS.items()},
        "measured": "",
        "other commit": row.get("commit", ""),
    }


def seconds_of(row: dict) -> float:
    """Of loading, compressing and saving."""
    return row["load_seconds"] + row["compress_seconds"] + row["save_seconds"]


def with_other_fits(row: dict, others: list[dict]) -> dict | None:
    """The whole model, on the line of these runs, with this run's fits in the place of theirs; None without a line."""
    if len({each["blocks"] for each in others}) < 2:
        return None
    whole, found = row["of_blocks"], extended(others, row["of_blocks"])
    more = (row["fit_seconds"] - extended(others, row["blocks"])["fit_seconds"]) * whole / row["blocks"]
    return {**found, "structure": row["structure"], "compress_seconds": found["compress_seconds"] + more}


def extended(rows: list[dict], blocks: int) -> dict:
    """A row of so many blocks: each number on the line of least squares through those of the rows.

    Peaks only of runs within a limit: without one, statistics grow faster than what stands at the peak of small models.
    """
    found = {**rows[0], "blocks": blocks, **dict.fromkeys(PEAKS.values())}
    limited = tuple(PEAKS.values()) if rows[0]["max_memory"] else ()
    for field in ("parameters", "load_seconds", "compress_seconds", "save_seconds", "fit_seconds", *limited):
        values = [row.get(field) for row in rows]
        if None not in values:
            slope, intercept = linear_regression([row["blocks"] for row in rows], values)
            found[field] = slope * blocks + intercept
    return found
