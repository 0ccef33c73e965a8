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
#: in which order rows stand, with the number of blocks last
BY = ("model", "max_memory", "tokens", "structure")
#: {column: the field of a row}
PEAKS = {
    "peak GB": "peak_bytes",
    "without mapped files": "peak_anonymous_bytes",
    "GPU GB": "peak_gpu_bytes",
}


def scale_section(name: str = "scale.json") -> str:
    """One line for each run, lines for whole models that are computed from two sizes or more, and the conditions."""
    result = json.loads((conditions.RESULTS / name).read_text())
    rows = sorted(result["rows"], key=lambda row: [str(row[key] or "") for key in BY] + [row["blocks"]])
    lines = [line_of(row) for row in rows]
    groups: dict[tuple, list[dict]] = {}
    for row in (row for row in rows if "stopped_in" not in row):
        groups.setdefault(tuple(row[key] for key in SETTINGS), []).append(row)
    for group in groups.values():
        whole, largest = group[0]["of_blocks"], max(group, key=lambda row: row["blocks"])
        same = [row for row in rows if all(row[key] == largest[key] for key in BUT_FITS)]
        line = [row for row in same if row["structure"] == "low_rank"]
        if largest["blocks"] < whole and len({row["blocks"] for row in line}) > 1:
            lines.append({**line_of(with_fits_of(largest, line)), "measured": "computed"})
    kills = [
        f"A run of {row['blocks']} blocks of {row['model']}, {row['structure']}, {row['tokens']} tokens"
        f"{', within ' + row['max_memory'] if row['max_memory'] else ''}, that was killed after "
        f"{row['killed_after']:.0f} s, with half of its layers finished, took {row['seconds_after_kill']:.0f} s more; "
        f"one that nobody killed takes {seconds_of(row):.0f} s. The files are "
        f"{'the same to the last bit' if row['same_bits'] else 'not the same to the last bit'}.\n\n"
        for row in rows
        if "same_bits" in row
    ]
    return (
        f"{format_table(lines)}\n\n{''.join(kills)}"
        "Computed: on the straight line through low-rank's sizes above it; of another structure with its own fits, "
        "those of its largest size. Without a limit no peak, since statistics make it in a larger model. "
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
        "of the GPU": row.get("gpu_memory") or "",
        "of RAM, GB": f"{row['ram_bytes'] / GB:.1f}" if "ram_bytes" in row else "",
        "seconds": f"{seconds_of(row):.0f}",
        **{column: f"{row[field] / GB:.1f}" if row.get(field) else "" for column, field in PEAKS.items()},
        "measured": f"stopped in {row['stopped_in'].removesuffix('_seconds')}" if "stopped_in" in row else "",
        "other commit": row.get("commit", ""),
    }


def seconds_of(row: dict) -> float:
    """Of loading, compressing and saving, as far as the run came."""
    return sum(row.get(part, 0.0) for part in ("load_seconds", "compress_seconds", "save_seconds"))


def with_fits_of(row: dict, line: list[dict]) -> dict:
    """The whole model, on the line of these runs, with this run's fits in the place of theirs."""
    whole = row["of_blocks"]
    found = extended(line, whole)
    if row in line:
        return found
    more = (row["fit_seconds"] - extended(line, row["blocks"])["fit_seconds"]) * whole / row["blocks"]
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
