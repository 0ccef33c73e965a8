"""Tables of whole models."""

from __future__ import annotations

from conditions import RESULTS, table_of

from hf_blr.bench.model_peaks import predicted_parts
from hf_blr.bench.report.commits import commits_of, rows_of
from hf_blr.bench.report.files import read_result
from hf_blr.bench.report.lines import wide
from hf_blr.bench.report.model_tables import (
    MEASUREMENTS,
    by_size,
    memory,
    profile_lines,
    speed,
    speed_lines,
    storage_lines,
)
from hf_blr.roofline.devices import DEVICES

VARIANTS = {"low_rank": "low-rank", "monarch:4x4": "Monarch 4x4", "blast:4x4": "BLAST 4x4"}
PAPERS = {"low_rank:paper": "low-rank", "monarch:paper": "Monarch", "blast:paper": "BLAST"}
TITLES = {"prefill": "Prefill", "decode": "Decoding one token of each text", "training": "A training step"}
#: tokens of a prefill that are shown of one text alone
OTHER_TOKENS = (128, 4096)
#: whose time the table of parts shows, and in which forms
PROFILED, PROFILED_FORMS = ("Llama-7B", "Qwen3-4B"), ("dense", *(f"{name}+fused" for name in VARIANTS))


def models_section() -> str:
    """Whole models, a table each of prefill, decoding and a training step.

    A line holds the dense model's milliseconds, and speed over dense of each structure, fused where faster.
    """
    result = read_result(RESULTS / "models_h100.json")
    rows = [row for row in model_rows() if not of_several_texts(row)]
    lines = [
        line | {"peak memory": memory(shown), "commit": commits_of(shown)}
        for line, shown in speed_lines(rows, VARIANTS)
    ]
    columns = ["model", "batch x tokens", "dense, ms", *VARIANTS.values(), "peak memory"]
    tables = []
    for measurement in dict.fromkeys(line[""] for line in lines):
        table, where = table_of([line for line in lines if line[""] == measurement], rows, result, columns)
        tables.append(f"{TITLES[measurement]}:\n\n{table}\n\n")
    modes = sorted({row["mode"] for row in rows if "mode" in row})
    attending = [
        f"{model}, {size}, {found['dense+attention']['ms']:.2f} ms"
        for measurement in MEASUREMENTS
        for (model, size), found in by_size(rows, measurement).items()
        if "dense+attention" in found
    ]
    said = (
        "\\* with `hf_blr.fuse`. Peak memory: as a share of dense's. Each in its fastest form among those measured, "
        f"dense too; torch.compile in mode {' and '.join(modes)}."
    )
    also = f"Dense with the attention of fused models: {'; '.join(attending)}. " if attending else ""
    return (
        f"{''.join(tables)}{said} {also}{result['dtype']}, {result['protocol']}; half of each projection kept. "
        f"{where}, transformers {result['environment']['transformers']}."
    )


def model_rows() -> list[dict]:
    """Of whole models, without those that failed."""
    return [row for row in rows_of(read_result(RESULTS / "models_h100.json")) if "error" not in row]


def of_several_texts(row: dict) -> bool:
    """Whether it is a prefill of a size that is shown of one text alone."""
    return row["measurement"] == "prefill" and row["tokens"] in OTHER_TOKENS and row["batch"] > 1


def papers_section() -> str:
    """As `models_section`, at the ranks and blocks of the paper, and what these keep of a model's projections."""
    rows = model_rows()
    numbers = {(row["model"], row["variant"].removesuffix("+fused")): row["projection_parameters"] for row in rows}

    def cell(row):
        model, variant = row["model"], row["variant"].removesuffix("+fused")
        return f"{speed(row)} ({100 * numbers[model, variant] / numbers[model, 'dense']:.0f} %)"

    lines = [line | {"commit": commits_of(shown)} for line, shown in speed_lines(rows, PAPERS, cell)]
    table, where = table_of(lines, rows, read_result(RESULTS / "models_h100.json"))
    said = "\\* with `hf_blr.fuse`; in brackets what is kept of all projections."
    return f"{table}\n\n{said} Other conditions as under Whole models. {where}."


def storage_section() -> str:
    """Whole models on disk."""
    lines = storage_lines(model_rows(), VARIANTS)
    table, where = table_of(lines, model_rows(), read_result(RESULTS / "models_h100.json"))
    return f"{table}\n\n{where}."


def profiles_section() -> str:
    """Where the time of whole models goes."""
    rows = [row for row in model_rows() if row["model"] in PROFILED and row["variant"] in PROFILED_FORMS]
    lines = profile_lines(rows, lambda row: predicted_parts(row, DEVICES["H100-measured"]))
    said = "Projections: all products, those of the output layer and of patches too."
    table, where = table_of(lines, rows, read_result(RESULTS / "models_h100.json"))
    return f"{table}\n\n{said} {where}."


def dependent_launches_section() -> str:
    """A decoding step with and without dependent launches in Inductor's kernels."""
    result = read_result(RESULTS / "dependent_launches_h100.json")
    lines = wide(
        sorted(rows_of(result), key=lambda row: row["dependent_launches"]),
        lambda row: {"Llama-7B, one text": row["variant"], "mode": row["mode"]},
        lambda row: {f"ms {'with' if row['dependent_launches'] else 'without'}": f"{row['graph_ms']:.2f}"},
    )
    table, where = table_of(lines, rows_of(result), result)
    return f"{table}\n\n{result['dtype']}, {result['protocol']}. {where}."
