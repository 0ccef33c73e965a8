"""Tables of layers and kernels, and of how well the roofline predicts them."""

from __future__ import annotations

from conditions import RESULTS, machine, table_of
from model_sections import model_rows

from hf_blr.bench.model_peaks import model_predictions
from hf_blr.bench.peaks import predictions
from hf_blr.bench.report.commits import rows_of
from hf_blr.bench.report.files import read_result
from hf_blr.bench.report.layer_tables import group_lines, layer_lines, prediction_lines
from hf_blr.bench.report.lines import blocks_of, tokens_of, wide
from hf_blr.markdown import format_table
from hf_blr.ops.rules.swap import reads_swapped
from hf_blr.roofline.devices import DEVICES

#: the layer that the speed table shows: q, k, v and o of Llama-7B, 4096 -> 4096
SPEED_LAYER = ("Llama-7B", "q,k,v,o")
#: and how many tokens
SPEED_TOKENS = ("1 tokens", "16 tokens", "1024 tokens", "4096 tokens", "4096 tokens, training")


def speed_section() -> str:
    """Speed-ups of one layer over dense cuBLAS, by structure and number of tokens."""
    result = read_result(RESULTS / "layers_h100.json")
    rows = [row for row in rows_of(result) if (row["model"], row["layer"], row["impl"]) == (*SPEED_LAYER, "hf_blr")]
    columns = ["structure", "blocks", "rank", *SPEED_TOKENS]
    table, where = table_of(layer_lines(rows), rows, result, columns)
    return (
        f"{table}\n\n"
        f"Speed over dense cuBLAS of one 4096 x 4096 layer at half the parameters, bfloat16; {result['protocol']}. "
        f"{where}."
    )


def groups_section() -> str:
    """Projections with one input, one by one and together, over the faster of two ways to run the dense ones."""
    result = read_result(RESULTS / "groups_h100.json")
    rows = [row for row in rows_of(result) if row["blocks"] in ([1, 1], [4, 4])]
    table, where = table_of(group_lines(rows), rows, result)
    return (
        f"{table}\n\n"
        "Speed over dense at half the parameters, one by one -> together, bfloat16; dense is "
        "the faster of one product for each projection and one with the concatenated weights. "
        f"{result['protocol']}. {where}."
    )


def one_token_section() -> str:
    """What both stages of one token take, before and with the kernels whose programs stay."""
    result = read_result(RESULTS / "one_token_h100.json")
    table = [
        {
            "us": f"{row['structure']} {blocks_of(row)}, {row['layer']}",
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
    first = "us, in place / copied"

    def cell(row):
        swapped = reads_swapped(row["b1"], row["b2"], row["q"], row["rank"], row["tokens"])
        marks = ("*", "") if swapped else ("", "*")
        return {tokens_of(row): f"{row['in_place_us']:.0f}{marks[0]} / {row['copied_us']:.0f}{marks[1]}"}

    lines = wide(
        rows_of(result),
        lambda row: {first: f"{row['layer']}, {row['b1']} x {row['b2']}, rank {row['rank']}"},
        cell,
    )
    table, where = table_of(lines, rows_of(result), result)
    return f"{table}\n\n\\* what the rule takes. {result['dtype']}, {result['protocol']}. {where}."


def stacks_section() -> str:
    """The first stages of few tokens, as single kernels and as stacks of products."""
    result = read_result(RESULTS / "stacks_h100.json")
    first = "us, by decode_project / as a stack / by cuBLAS"

    def cell(row):
        found = [row["project_us"], row["stack_us"], *([row["cublas_us"]] if row["cublas_us"] else [])]
        return {tokens_of(row): " / ".join(f"{us:.1f}" for us in found)}

    rows = rows_of(result)
    lines = wide(
        rows,
        lambda row: {first: f"{row['structure']} {blocks_of(row)}, {row['model']} {row['layer']}"},
        cell,
    )
    columns = [first, *(f"{tokens} tokens" for tokens in sorted({row["tokens"] for row in rows}))]
    table, where = table_of(lines, rows, result, columns)
    return f"{table}\n\n{result['dtype']}, {result['protocol']}. {where}."


def roofline_section() -> str:
    """How well the predictions do on the layers and whole models that were measured."""
    device = DEVICES["H100-measured"]
    result = read_result(RESULTS / "layers_h100.json")
    layers, models = predictions(rows_of(result), device), model_predictions(model_rows(), device)
    lines = prediction_lines(layers, models)
    table, where = table_of(lines, rows_of(result) + model_rows(), result)
    return f"{table}\n\nOf the layers and whole models above. {where}."
