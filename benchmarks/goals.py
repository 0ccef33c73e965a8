"""What was aimed at beside what was measured, from the result files: the tables at the head of NOTES.md."""

from __future__ import annotations

import statistics

from conditions import RESULTS

from hf_blr.bench.report.files import read_result
from hf_blr.bench.report.tables import by_size
from hf_blr.cli.table import format_table

#: the layer of most single goals: q, k, v and o of Llama-7B, 4096 -> 4096
LAYER = "q,k,v,o"
STRUCTURES = {
    "low-rank": ("low_rank", 1, 1),
    "pivoted": ("pivoted", 1, 1),
    "Monarch 4x4": ("monarch", 4, 4),
    "BLAST 4x4": ("blast", 4, 4),
    "BLAST 4x16": ("blast", 4, 16),
    "BLAST 16x16": ("blast", 16, 16),
}


def layer_goals() -> str:
    """One layer against dense cuBLAS."""
    rows = [row for row in read_result(RESULTS / "layers_h100.json")["rows"] if row["impl"] == "hf_blr"]

    def speed(structure, b1, b2):
        wanted = ("Llama-7B", LAYER, 1024, "forward", structure, [b1, b2])
        keys = ("model", "layer", "tokens", "direction", "structure", "blocks")
        return next(row["speedup_vs_dense"] for row in rows if tuple(row[key] for key in keys) == wanted)

    def speeds(tokens, direction="forward"):
        """Of each structure, the geometric mean over the layers of Llama-7B."""
        found = []
        for name, (structure, *blocks) in STRUCTURES.items():
            here = [
                row["speedup_vs_dense"]
                for row in rows
                if (row["model"], row["tokens"], row["direction"]) == ("Llama-7B", tokens, direction)
                and (row["structure"], row["blocks"]) == (structure, blocks)
            ]
            found.append(f"{name} {statistics.geometric_mean(here):.2f}")
        return ", ".join(found)

    def best(structures):
        """Geometric mean over the layers of Llama-7B and Llama-3.2-1B at 1024 tokens, the best structure for each."""
        layers: dict[tuple, float] = {}
        for row in rows:
            if "Llama" in row["model"] and (row["tokens"], row["direction"]) == (1024, "forward"):
                key = row["model"], row["layer"]
                if row["structure"] in structures:
                    layers[key] = max(layers.get(key, 0.0), row["speedup_vs_dense"])
        return f"{statistics.geometric_mean(layers.values()):.2f}"

    def over_low_rank(structure):
        """Time over low-rank's at 4x4 blocks, for q, gate and down."""
        found = [
            row["us"] / row["lowrank_us"]
            for row in rows
            if (row["model"], row["tokens"], row["direction"]) == ("Llama-7B", 1024, "forward")
            and (row["structure"], row["blocks"]) == (structure, [4, 4])
        ]
        return " / ".join(f"{ratio:.2f}" for ratio in found)

    first = [row["first_call_s"] for row in rows if row["first_call_s"] is not None]
    late = sum(seconds > 5 for seconds in first)
    table = [
        ("BLAST 16x16, 1024 tokens", "1.15", f"{speed('blast', 16, 16):.2f}"),
        ("BLAST 4x16 and 4x32", "1.35", f"{speed('blast', 4, 16):.2f} and {speed('blast', 4, 32):.2f}"),
        ("BLAST 4x4", "1.45", f"{speed('blast', 4, 4):.2f}"),
        ("Monarch 16x16 and 4x4", "1.35 and 1.5", f"{speed('monarch', 16, 16):.2f} and {speed('monarch', 4, 4):.2f}"),
        ("low-rank (two cuBLAS products)", "", f"{speed('low_rank', 1, 1):.2f}"),
        ("pivoted", "", f"{speed('pivoted', 1, 1):.2f}"),
        ("time over low-rank's, 4x4, q / gate / down: Monarch", "at most 1.10", over_low_rank("monarch")),
        ("... BLAST", "at most 1.10", over_low_rank("blast")),
        ("best structure, Llama-7B and -1B layers", "1.5", best({name for name, *_ in STRUCTURES.values()})),
        ("... BLAST or Monarch only", "1.5", best({"blast", "monarch"})),
        ("1 token, Llama-7B's layers", "1.85", speeds(1)),
        ("16 tokens", "1.85", speeds(16)),
        ("4096 tokens", "", speeds(4096)),
        ("forward + backward, 4096 tokens", "1.3", speeds(4096, "forward+backward")),
        ("slowest first call with nothing compiled, s", "5", f"{max(first):.1f} ({late} of {len(first)} above 5)"),
    ]
    return as_table(table)


def model_goals() -> str:
    """Llama-7B's shape as a whole."""
    rows = [row for row in read_result(RESULTS / "models_h100.json")["rows"] if "error" not in row]

    def line(measurement, batch, tokens=1):
        found = by_size(rows, measurement).get(("Llama-7B", f"{batch} x {tokens}"), {})
        speeds = sorted(
            ((row["speed over dense"], name) for name, row in found.items() if name != "dense"), reverse=True
        )
        return ", ".join(f"{name} {speed:.2f}" for speed, name in speeds)

    decoding = [r for r in rows if (r["model"], r["measurement"], r.get("batch")) == ("Llama-7B", "decode", 1)]
    dense = min((row for row in decoding if row["variant"] == "dense"), key=lambda row: row["graph_ms"])
    devices: dict[str, float] = {}
    for row in decoding:
        name = row["variant"].removesuffix("+fused")
        if name != "dense":
            devices[name] = max(devices.get(name, 0.0), dense["graph_ms"] / row["graph_ms"])
    graphs = sorted(((speed, name) for name, speed in devices.items()), reverse=True)
    memory = [r["peak_bytes"] / dense["peak_bytes"] for r in decoding if not r["variant"].startswith("dense")]
    table = [
        *(
            (f"prefill, {batch} x {tokens}", "1.5" if (batch, tokens) == (1, 1024) else "", found)
            for tokens in (128, 1024, 4096)
            for batch in (1, 8)
            if (found := line("prefill", batch, tokens))
        ),
        ("decoding one text, tokens a second", "1.7", line("decode", 1)),
        ("... the device's part of it", "", ", ".join(f"{name} {speed:.2f}" for speed, name in graphs)),
        ("... 8 texts", "", line("decode", 8)),
        ("... 32 texts", "", line("decode", 32)),
        ("peak memory of decoding one text, of dense", "0.55", f"{min(memory):.2f} to {max(memory):.2f}"),
    ]
    return as_table(table)


def counters() -> str:
    """Where the prefill kernels' time goes."""
    result = read_result(RESULTS / "counters_h100.json")
    shown = {
        "l2_to_sm_mb": "L2 to SM, MB",
        "dram_mb": "memory, MB",
        "tensor_pct": "tensor cores, %",
        "shared_pct": "shared memory, %",
    }
    rows = [
        {"layer": row["layer"], "kernel": row["kernel"].partition("_64x")[0], "us": row["us"]}
        | {name: row[key] for key, name in shown.items()}
        for row in result["rows"]
    ]
    where = result["environment"]
    return f"{format_table(rows)}\n\n{result['protocol']}. {where['device']}, {where['date']}."


def as_table(rows: list[tuple[str, str, str]]) -> str:
    """Markdown of (what, goal, measured)."""
    return format_table([dict(zip(("speed over dense", "goal", "measured"), row, strict=True)) for row in rows])
