"""The table of whole runs against the size of the model."""

from __future__ import annotations

import json

import conditions

from hf_blr.markdown import format_table

GB = 1e9
#: in which order rows stand, with the number of blocks last
BY = ("model", "max_memory", "tokens", "structure")
#: {column: the field of a row}
PEAKS = {
    "peak GB": "peak_bytes",
    "without mapped files": "peak_anonymous_bytes",
    "GPU GB": "peak_gpu_bytes",
}


def scale_section(name: str = "scale.json") -> str:
    """One line for each run, what kills cost, and the conditions."""
    result = json.loads((conditions.RESULTS / name).read_text())
    rows = sorted(result["rows"], key=lambda row: [str(row[key] or "") for key in BY] + [row["blocks"]])
    lines = [line_of(row) for row in rows]
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
        "seconds": f"{seconds_of(row):.0f}" + (", not to its end" if "stopped_in" in row else ""),
        **{column: f"{row[field] / GB:.1f}" if row.get(field) else "" for column, field in PEAKS.items()},
        "other commit": row.get("commit", ""),
    }


def seconds_of(row: dict) -> float:
    """Of loading, compressing and saving, as far as the run came."""
    return sum(row.get(part, 0.0) for part in ("load_seconds", "compress_seconds", "save_seconds"))
