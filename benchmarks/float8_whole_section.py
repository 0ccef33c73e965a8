"""Groups of projections, whole models and training steps in float8, beside dense in bfloat16 and in float8."""

from __future__ import annotations

from conditions import RESULTS, machine, table_of
from float8_training import MODEL, PROTOCOL, STEPS

from hf_blr.bench.model_peaks import model_predictions
from hf_blr.bench.report.commits import commits_of, rows_of
from hf_blr.bench.report.files import read_result
from hf_blr.bench.report.lines import grouped, wide
from hf_blr.formats import PLAIN
from hf_blr.markdown import format_table
from hf_blr.roofline.devices import DEVICES

FAMILIES = {"dense": "dense", "low_rank": "low-rank", "low_rank@128": "low-rank, ranks that 128 divides"}
#: variants that the others are compared with
COMPARED = ("dense", "dense/fp8", "dense/fp8, torchao")
#: {column: parts of a profile}
KINDS = {
    "products": ("products", "blr"),
    "attention": ("attention",),
    "elementwise": ("elementwise",),
    "idle": ("idle",),
}


def groups_section() -> str:
    """Projections with one input, in float8 one by one and together."""
    result = read_result(RESULTS / "float8_h200.json")
    rows = [row for row in rows_of(result) if row["measured"] == "group"]

    def cell(row: dict) -> dict[str, str]:
        how = f"{'bfloat16' if row['format'] == PLAIN.name else row['format']}, {row['how']}"
        speeds = f"{row['us']:.0f}, {row['dense_us'] / row['us']:.2f}x, {row['dense_fp8_us'] / row['us']:.2f}x"
        return {how: speeds} | ({"error": f"{row['rel_error']:.4f}"} if how == "fp8, together" else {})

    lines = wide(
        rows,
        lambda row: {
            "group": row["group"],
            "tokens": row["tokens"],
            "dense": f"{row['dense_us']:.0f}",
            "dense in float8": f"{row['dense_fp8_us']:.0f}",
        },
        cell,
    )
    table, where = table_of(lines, rows, result)
    return (
        f"{table}\n\nus, speed over dense in bfloat16 and in float8; low-rank, half of each projection kept; casts of "
        "the input counted. Error: the largest of the projections in fp8, together, against float64 of the dequantised "
        "factors. Dense: the faster of one product for each projection and one with the concatenated weights. Medians "
        f"of CUDA-graph replays, L2 flushed before each. {where}."
    )


def training_section() -> str:
    """A training step of decoder blocks, and the errors of gradients in float8."""
    result = read_result(RESULTS / "float8_h200.json")
    rows = rows_of(result)
    steps = [row for row in rows if row["measured"] == "training step"]
    steps.sort(key=lambda row: STEPS.index((row["variant"], row["impl"])))
    dense = next(row for row in steps if row["variant"] == "dense" and not row["float8"])
    lines = [
        {
            "": f"{FAMILIES[row['variant']]}, {products_of(row)}",
            "ms": f"{row['ms']:.2f}",
            "over dense": f"{dense['ms'] / row['ms']:.2f}x",
            "parameters / dense": f"{row['trained_parameters'] / dense['trained_parameters']:.2f}",
            "peak memory / dense": f"{row['peak_bytes'] / dense['peak_bytes']:.2f}",
            **parts_of(row),
        }
        for row in steps
    ]
    size = f"{dense['blocks']} blocks of {MODEL}'s shape, {dense['batch']} x {dense['tokens']} tokens"
    errors = [error_line(row) for row in rows if row["measured"] == "training error"]
    where = machine(result["environment"] | {"commit": commits_of(steps), "date": dense["date"]})
    return (
        f"{format_table(lines)}\n\n{size}; {PROTOCOL}. Dense in float8: one scale a tensor "
        "(`benchmarks/dense_float8.py`). ms of kernels by kind from a profile of one replay; casts, clipping and AdamW "
        "are among the elementwise ones.\n\n"
        "Errors against float64 of a low-rank layer in float8, of random numbers and tokens of very different size:\n\n"
        f"{format_table(errors)}\n\n{where}."
    )


def parts_of(row: dict) -> dict[str, str]:
    """{kind: ms} of a row's profile; nothing of one without."""
    parts = row["profile"]["parts"] if "profile" in row else None
    return {name: f"{sum(parts[part] for part in of):.2f}" if parts else "" for name, of in KINDS.items()}


def products_of(row: dict) -> str:
    return "float8 by torchao" if row["impl"] == "torchao" else "float8" if row["float8"] else "bfloat16"


def error_line(row: dict) -> dict:
    sizes = f"{row['in_features']} x {row['out_features']}, {row['rank']}"
    line = {"in x out, rank": sizes, "tokens": row["tokens"]}
    for title, impl in (("", "auto"), (", multiplied in float32", "reference")):
        line |= {
            name + title: f"{error:.4f}" for name, error in zip(("output", "dx", "du", "dv"), row[impl], strict=True)
        }
    return line


def prefill_section() -> str:
    """Prefill of whole models whose factors are kept in fp8, and of others that were timed in the same rounds."""
    result = read_result(RESULTS / "models_h200.json")
    rows = [row for row in rows_of(result) if row["model"] == MODEL and row["measurement"] == "prefill"]
    counted = model_predictions(rows, DEVICES["H200-measured"])
    predicted = {(row["variant"], row["tokens"]): row["predicted_ms"] for row in counted}
    lines = []
    for tokens, group in grouped(sorted(rows, key=lambda row: -row["tokens"]), lambda row: row["tokens"]).items():
        ms = {row["variant"]: row["ms"] for row in group}
        for row in sorted(group, key=lambda row: -row["ms"]):
            line = {"tokens": tokens, "variant": row["variant"], "ms": f"{row['ms']:.2f}"}
            line |= {f"over {name}": f"{ms[name] / row['ms']:.2f}x" for name in COMPARED}
            known = predicted.get((row["variant"], tokens))
            line["predicted ms"] = "" if known is None else f"{known:.2f}"
            lines.append(line | parts_of(row))
    where = machine(result["environment"] | {"commit": commits_of(rows)})
    return (
        f"{format_table(lines)}\n\n{MODEL}, one text, half of each projection kept, @128: at ranks cut so that 128 "
        "divides them, compiled blocks in one CUDA graph; dense/fp8: the matrices in fp8, by cuBLAS behind a cast that "
        "joins the norm before. The variants took turns in three rounds, of which the median counts. Predicted: by the "
        f"counts of `hf-blr roofline`. ms of kernels by kind from a profile of one replay. {where}."
    )
