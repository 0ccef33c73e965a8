"""What was aimed at beside what was measured, from the result files: the goals' tables of docs/measured.md."""

from __future__ import annotations

from statistics import geometric_mean

from conditions import RESULTS
from model_sections import model_rows

from hf_blr.bench.report.files import read_result
from hf_blr.bench.report.lines import grouped, label_of
from hf_blr.bench.report.model_tables import by_size
from hf_blr.markdown import format_table

#: the layer of most single goals: q, k, v and o of Llama-7B, 4096 -> 4096
LAYER = "q,k,v,o"
FORMS = {
    "low_rank": "low-rank",
    "pivoted": "pivoted",
    "monarch 4x4": "Monarch 4x4",
    "blast 4x4": "BLAST 4x4",
    "blast 4x16": "BLAST 4x16",
    "blast 16x16": "BLAST 16x16",
}


def layer_goals() -> str:
    """One layer against dense cuBLAS."""
    import pandas

    rows = [row for row in read_result(RESULTS / "layers_h100.json")["rows"] if row["impl"] == "hf_blr"]
    frame = pandas.DataFrame([row | {"form": label_of(row)} for row in rows])

    def of(model, tokens, direction="forward"):
        place = (frame.model == model, frame.tokens == tokens, frame.direction == direction)
        return frame[place[0] & place[1] & place[2]]

    prefill = of("Llama-7B", 1024)
    speed = prefill[prefill.layer == LAYER].set_index("form").speedup_vs_dense.map("{:.2f}".format)

    def speeds(tokens, direction="forward"):
        """Of each structure, the geometric mean over the layers of Llama-7B."""
        found = of("Llama-7B", tokens, direction).groupby("form").speedup_vs_dense.apply(geometric_mean)
        return ", ".join(f"{name} {found[form]:.2f}" for form, name in FORMS.items())

    def best(structures):
        """Geometric mean over the layers of Llama-7B and Llama-3.2-1B at 1024 tokens, the best structure for each."""
        both = pandas.concat([prefill, of("Llama-3.2-1B", 1024)])
        layers = both[both.structure.isin(structures)].groupby(["model", "layer"])
        return f"{geometric_mean(layers.speedup_vs_dense.max()):.2f}"

    def over_low_rank(form):
        """Time over low-rank's, for q, gate and down."""
        mine = prefill[prefill.form == form]
        return " / ".join((mine.us / mine.lowrank_us).map("{:.2f}".format))

    first = frame.first_call_s.dropna()
    late = f"{first.max():.1f} ({(first > 5).sum()} of {len(first)} above 5)"
    table = [
        ("BLAST 16x16, 1024 tokens", "1.15", speed["blast 16x16"]),
        ("BLAST 4x16 and 4x32", "1.35", f"{speed['blast 4x16']} and {speed['blast 4x32']}"),
        ("BLAST 4x4", "1.45", speed["blast 4x4"]),
        ("Monarch 16x16 and 4x4", "1.35 and 1.5", f"{speed['monarch 16x16']} and {speed['monarch 4x4']}"),
        ("low-rank (two cuBLAS products)", "", speed["low_rank"]),
        ("pivoted", "", speed["pivoted"]),
        ("time over low-rank's, 4x4, q / gate / down: Monarch", "at most 1.10", over_low_rank("monarch 4x4")),
        ("... BLAST", "at most 1.10", over_low_rank("blast 4x4")),
        ("best structure, Llama-7B and -1B layers", "1.5", best(set(frame.structure))),
        ("... BLAST or Monarch only", "1.5", best({"blast", "monarch"})),
        ("1 token, Llama-7B's layers", "1.85", speeds(1)),
        ("16 tokens", "1.85", speeds(16)),
        ("4096 tokens", "", speeds(4096)),
        ("forward + backward, 4096 tokens", "1.3", speeds(4096, "forward+backward")),
        ("slowest first call with nothing compiled, s", "5", late),
    ]
    return as_table(table)


def model_goals() -> str:
    """Llama-7B's shape as a whole."""
    rows = [row for row in model_rows() if row["model"] == "Llama-7B"]

    def line(measurement, batch, tokens=1):
        found = by_size(rows, measurement).get(("Llama-7B", f"{batch} x {tokens}"), {})
        return ranking({name: row["speed over dense"] for name, row in found.items() if name != "dense"})

    decoding = [row for row in rows if (row["measurement"], row.get("batch")) == ("decode", 1)]
    graphs = grouped(decoding, lambda row: row["variant"].removesuffix("+fused"))
    dense = min(graphs.pop("dense"), key=lambda row: row["graph_ms"])
    device = {name: max(dense["graph_ms"] / row["graph_ms"] for row in group) for name, group in graphs.items()}
    memory = [r["peak_bytes"] / dense["peak_bytes"] for r in decoding if not r["variant"].startswith("dense")]
    table = [
        *(
            (f"prefill, {batch} x {tokens}", "1.5" if (batch, tokens) == (1, 1024) else "", found)
            for tokens in (128, 1024, 4096)
            for batch in (1, 8)
            if (found := line("prefill", batch, tokens))
        ),
        ("decoding one text, tokens a second", "1.7", line("decode", 1)),
        ("... the device's part of it", "", ranking(device)),
        ("... 8 texts", "", line("decode", 8)),
        ("... 32 texts", "", line("decode", 32)),
        ("peak memory of decoding one text, of dense", "0.55", f"{min(memory):.2f} to {max(memory):.2f}"),
    ]
    return as_table(table)


def ranking(speeds: dict[str, float]) -> str:
    """`a 1.75, b 1.66`, the fastest first."""
    order = sorted(((speed, name) for name, speed in speeds.items()), reverse=True)
    return ", ".join(f"{name} {speed:.2f}" for speed, name in order)


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
