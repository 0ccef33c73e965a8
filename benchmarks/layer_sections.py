"""Tables of layers and kernels, and of how well the roofline predicts them."""

from __future__ import annotations

from conditions import RESULTS, table_of
from model_sections import model_rows

from hf_blr.bench.model_peaks import model_predictions
from hf_blr.bench.peaks import predictions
from hf_blr.bench.report.commits import rows_of
from hf_blr.bench.report.files import read_result
from hf_blr.bench.report.layer_tables import group_lines, layer_lines, prediction_lines
from hf_blr.markdown import format_table
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


def counters() -> str:
    """What each kernel of one forward moves, and how busy it is."""
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


def roofline_section() -> str:
    """How well the predictions do on the layers and whole models that were measured."""
    device = DEVICES["H100-measured"]
    result = read_result(RESULTS / "layers_h100.json")
    layers, models = predictions(rows_of(result), device), model_predictions(model_rows(), device)
    lines = prediction_lines(layers, models)
    table, where = table_of(lines, rows_of(result) + model_rows(), result)
    return f"{table}\n\nOf the layers and whole models above. {where}."
