"""Tables of layers and kernels, and of how well the roofline predicts them."""

from __future__ import annotations

import statistics

from conditions import RESULTS, commits_of, machine
from model_sections import model_rows

from hf_blr.bench.model_peaks import model_predictions
from hf_blr.bench.peaks import predictions
from hf_blr.bench.report.files import read_result
from hf_blr.cli.table import format_table
from hf_blr.ops.rules.swap import reads_swapped
from hf_blr.roofline.devices import DEVICES

#: the layer that the speed table shows: q, k, v and o of Llama-7B, 4096 -> 4096
SPEED_LAYER = ("Llama-7B", "q,k,v,o")


def speed_section() -> str:
    """Speed-ups of one layer over dense cuBLAS, by structure and number of tokens."""
    result = read_result(RESULTS / "layers_h100.json")
    table: dict[tuple, dict] = {}
    for row in result["rows"]:
        if (row["model"], row["layer"]) == SPEED_LAYER and row["impl"] == "hf_blr":
            key = row["structure"], *row["blocks"], row["rank"]
            column = f"{row['tokens']} tokens" + (", training" if row["direction"] != "forward" else "")
            table.setdefault(key, {})[column] = row["speedup_vs_dense"]
    columns = ["1 tokens", "16 tokens", "1024 tokens", "4096 tokens", "4096 tokens, training"]
    rows = [
        {"structure": s, "blocks": f"{b1} x {b2}", "rank": r, **{c: f"{speed[c]:.2f}x" for c in columns if c in speed}}
        for (s, b1, b2, r), speed in table.items()
    ]
    return (
        f"{format_table(rows, ['structure', 'blocks', 'rank', *columns])}\n\n"
        f"Speed over dense cuBLAS of one 4096 x 4096 layer at half the parameters, bfloat16; {result['protocol']}. "
        f"{machine(result['environment'], commits_of(result['rows'], result['environment']['commit']))}."
    )


def groups_section() -> str:
    """Projections with one input, one by one and together, over the faster of two ways to run the dense ones."""
    result = read_result(RESULTS / "groups_h100.json")
    table: dict[tuple, dict] = {}
    for row in result["rows"]:
        if row["structure"] != "dense" and row["blocks"] in ([1, 1], [4, 4]):
            key = row["group"], row["structure"], *row["blocks"]
            table.setdefault(key, {})[row["tokens"], row["how"]] = f"{row['speedup_vs_dense']:.2f}x"
    tokens = sorted({row["tokens"] for row in result["rows"]})
    rows = [
        {"group": group, "structure": s, "blocks": f"{b1} x {b2}"}
        | {f"{t} tokens": f"{speed[t, 'apart']} -> {speed[t, 'together']}" for t in tokens}
        for (group, s, b1, b2), speed in table.items()
    ]
    return (
        f"{format_table(rows)}\n\nSpeed over dense at half the parameters, one by one -> together, bfloat16; dense is "
        "the faster of one product for each projection and one with the concatenated weights. "
        f"{result['protocol']}. {machine(result['environment'])}."
    )


def one_token_section() -> str:
    """What both stages of one token take, before and with the kernels whose programs stay."""
    result = read_result(RESULTS / "one_token_h100.json")
    table = [
        {
            "us": f"{row['structure']} {row['blocks'][0]} x {row['blocks'][1]}, {row['layer']}",
            "its bytes at 3 TB/s": f"{row['megabytes'] / 3:.1f}",
            "before": f"{row['us_before']:.1f} ({row['us_before_apart']:.1f})",
            "now": f"{row['us']:.1f} ({row['us_apart']:.1f})",
        }
        for row in result["rows"]
    ]
    return (
        f"{format_table(table)}\n\nIn brackets: behind another kernel. {result['dtype']}, {result['protocol']}. "
        f"{machine(result['environment'])}."
    )


def monarch_last_stage_section() -> str:
    """Both ways to run Monarch's last stage at many tokens, and which one the rule takes."""
    result = read_result(RESULTS / "monarch_last_stage_h100.json")
    table: dict[tuple, dict] = {}
    for row in result["rows"]:
        sizes = row["b1"], row["b2"], row["q"], row["rank"]
        place = f"{row['layer']}, {row['b1']} x {row['b2']}, rank {row['rank']}"
        marks = ("*", "") if reads_swapped(*sizes, row["tokens"]) else ("", "*")
        us = f"{row['in_place_us']:.0f}{marks[0]} / {row['copied_us']:.0f}{marks[1]}"
        table.setdefault((row["layer"], *sizes), {"us, in place / copied": place})[f"{row['tokens']} tokens"] = us
    return (
        f"{format_table(list(table.values()))}\n\n\\* what the rule takes. {result['dtype']}, {result['protocol']}. "
        f"{machine(result['environment'])}."
    )


def stacks_section() -> str:
    """The first stages of few tokens, as single kernels and as stacks of products."""
    result = read_result(RESULTS / "stacks_h100.json")
    first, table = "us, by decode_project / as a stack / by cuBLAS", {}
    for row in result["rows"]:
        key = row["structure"], *row["blocks"], row["model"], row["layer"]
        line = table.setdefault(
            key, {"us, by decode_project / as a stack / by cuBLAS": "{} {} x {}, {} {}".format(*key)}
        )
        found = [row["project_us"], row["stack_us"], *([row["cublas_us"]] if row["cublas_us"] else [])]
        line[f"{row['tokens']} tokens"] = " / ".join(f"{us:.1f}" for us in found)
    tokens = sorted({row["tokens"] for row in result["rows"]})
    columns = [first, *(f"{t} tokens" for t in tokens)]
    where = machine(result["environment"], commits_of(result["rows"]))
    return f"{format_table(list(table.values()), columns)}\n\n{result['dtype']}, {result['protocol']}. {where}."


def roofline_section() -> str:
    """How well the predictions do on the layers and whole models that were measured."""
    device = DEVICES["H100-measured"]
    rows = predictions(read_result(RESULTS / "layers_h100.json")["rows"], device)
    groups: dict[str, list[float]] = {}
    for row in sorted(rows, key=lambda row: (row["direction"], row["tokens"])):
        name = f"{row['tokens']}" + (", training" if row["direction"] != "forward" else "")
        groups.setdefault(name, []).append(abs(row["deviation"]))
    table = [off_by(name, "layers", off) for name, off in groups.items()]
    models = model_predictions(model_rows(), device)
    for measurement, name in (("prefill", "whole models, prefill"), ("decode", "whole models, decoding")):
        off = [abs(row["deviation"]) for row in models if row["measurement"] == measurement]
        table.append(off_by(name, "rows", off))
    return format_table(table)


def off_by(name: str, what: str, off: list[float]) -> dict:
    """off: |predicted / measured - 1| of each."""
    within = f"{sum(value <= 0.25 for value in off)} of {len(off)} {what}"
    return {"tokens": name, "within 25 %": within, "median off": f"{100 * statistics.median(off):.0f} %"}
