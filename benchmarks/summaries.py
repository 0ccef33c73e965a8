"""Short tables of quality and of whole models: for the README a line for each choice that a user has, two for NOTES."""

from __future__ import annotations

from hf_blr.bench.model_ceilings import sizes_of_row
from hf_blr.bench.models import SHAPES
from hf_blr.cli.table import format_table
from hf_blr.evaluation.devices import DEVICES
from hf_blr.evaluation.whole_models import forward_parts, step_parts
from hf_blr.results.tables import compared

METHODS = {
    "whitened SVD": "whitened SVD",
    "ours": "ours",
    "ours, block-joint": "+ blocks",
    "ours, refined": "refined",
    "ours, block-joint, refined": "+ blocks, refined",
}
VARIANTS = {"low_rank": "low-rank", "monarch:4x4": "Monarch 4x4", "blast:4x4": "BLAST 4x4", "pivoted": "pivoted"}
#: the paper's own ranks and blocks, in the column of ours that comes closest
PAPERS = {"low_rank:paper": "low_rank", "monarch:paper": "monarch:4x4", "blast:paper": "blast:4x4"}


def quality_summary(rows: list[dict]) -> str:
    """One line for each size and structure: perplexities fitted and refined, `text / text`, and the fit's seconds."""
    texts = list(dict.fromkeys(row["dataset"] for row in rows))
    lines: dict[tuple, dict] = {}
    for row in sorted(rows, key=lambda row: (-row["ratio"], row["structure"] or "", row["blocks"] or [])):
        blocks = "" if row["blocks"] is None else " {} x {}".format(*row["blocks"])
        if row["structure"] is None:
            key, column = (row["ratio"], row["method"]), "ours"
        elif row["method"] in METHODS:
            key, column = (row["ratio"], f"{row['structure']}{blocks}"), METHODS[row["method"]]
        else:
            continue
        line = lines.setdefault(key, {"MB": f"{row['bytes'] / 1e6:.0f}"})
        line.setdefault(column, {})[row["dataset"]] = f"{row['ppl']:.{2 if row['ppl'] < 100 else 0}f}"
        if row["method"] == "ours" and row["fit_seconds"] is not None:
            line["fit, s"] = f"{row['fit_seconds']:.0f}"

    def scores(line, column):
        return " / ".join(line.get(column, {}).get(text, "") for text in texts).strip("/ ")

    table = [
        {"kept": f"{100 * ratio:.0f} %", "layers": name, "MB": line["MB"]}
        | {column: scores(line, column) for column in METHODS.values()}
        | {"fit, s": line.get("fit, s", "")}
        for (ratio, name), line in lines.items()
    ]
    return f"Perplexity on {' / '.join(texts)}:\n\n{format_table(table)}"


def models_summary(rows: list[dict]) -> str:
    """One line for each measurement: the dense model's milliseconds, and speed over dense, fused where faster."""
    table, attending = [], []
    for measurement in ("prefill", "decode", "training"):
        lines: dict[tuple, dict] = {}
        for row in compared(rows, measurement):
            size = f"{row['batch']} x {row['tokens']}" if "tokens" in row else f"{row['batch']} x 1"
            kept = row["form"].partition(", keeps ")[2]
            size += f", {kept} kept" if kept else ""
            line = lines.setdefault((row["model"], size), {})
            name = row["variant"].removesuffix("+fused")
            column = PAPERS.get(name, name)
            if name == "dense":
                line["dense, ms"] = f"{row['ms']:.2f}"
            elif name == "dense+attention":
                attending.append(f"{row['model']}, {size}, {row['ms']:.2f} ms")
            elif column in VARIANTS and row["speed over dense"] is not None:
                marks = "†" * (name in PAPERS) + "*" * (name != row["variant"])
                entry = row["speed over dense"], marks, row["peak / dense"] or 1.0
                line[column] = max(line.get(column, entry), entry)
        for (model, size), line in lines.items():
            found = {title: line.get(name) for name, title in VARIANTS.items()}
            memory = [entry[2] for entry in found.values() if entry]
            table.append(
                {"": measurement, "model": model, "batch x tokens": size, "dense, ms": line.get("dense, ms", "")}
                | {title: f"{entry[0]:.2f}x{entry[1]}" if entry else "" for title, entry in found.items()}
                | {"peak memory": f"{min(memory):.2f} to {max(memory):.2f}" if memory else ""}
            )
    marks = "\\* with `hf_blr.fuse`; † the paper's ranks and blocks."
    also = f" Dense with the attention of fused models: {'; '.join(attending)}." if attending else ""
    return f"{format_table(table)}\n\n{marks} Peak memory is that of dense.{also}"


def profiles(rows: list[dict]) -> str:
    """Where a graph's milliseconds go, by the profiler and, in brackets, by the roofline."""
    table = []
    for row in sorted((row for row in rows if "profile" in row), key=place_in_table):
        found = row["profile"]["parts"]
        measured = {"projections": found["products"] + found["blr"]} | {
            k: found[k] for k in ("attention", "elementwise")
        }
        graph = row.get("graph_ms", row["ms"])
        predicted = predicted_parts(row)
        line = {"ms": f"{row['model']}, {row['batch']} x {row['tokens']}", "": row["variant"], "mode": row["mode"]}
        line |= {part: with_brackets(ms, predicted.get(part)) for part, ms in measured.items()}
        line |= {"between": f"{found['idle']:.2f}", "in all": with_brackets(graph, sum(predicted.values()) or None)}
        table.append(line)
    return f"{format_table(table)}\n\nProjections: all products, those of the output layer and of patches too."


def place_in_table(row: dict) -> tuple:
    return row["model"], row["batch"] * row["tokens"], row["mode"], row["variant"] != "dense", row["variant"]


def predicted_parts(row: dict) -> dict[str, float]:
    """Milliseconds; {} for diffusion models."""
    if SHAPES[row["model"]].kind == "diffusion":
        return {}
    sizes, device = sizes_of_row(row), DEVICES["H100-measured"]
    if row["measurement"] == "decode":
        parts = step_parts(sizes, row["batch"], row["prompt"] + row["new_tokens"], device)
    else:
        parts = forward_parts(sizes, row["batch"], row["tokens"], device)
    parts["projections"] += parts.pop("once")
    return {part: 1e3 * seconds for part, seconds in parts.items()}


def with_brackets(measured: float, predicted: float | None) -> str:
    return f"{measured:.2f}" + ("" if predicted is None else f" ({predicted:.2f})")


def square_blast(rows: list[dict]) -> str:
    """BLAST 16x16 and low-rank at every size and stage: perplexities, `text / text` of the one, then of the other."""
    texts = list(dict.fromkeys(row["dataset"] for row in rows))
    found = {(r["ratio"], r["structure"], str(r["blocks"]), r["method"], r["dataset"]): r["ppl"] for r in rows}

    def scores(*what):
        values = [found.get((*what, text)) for text in texts]
        if None in values:
            return "-"
        return " / ".join(f"{value:.{2 if value < 100 else 0}f}" for value in values)

    table = []
    for ratio in sorted({row["ratio"] for row in rows if row["structure"]}, reverse=True):
        line = {"kept": f"{100 * ratio:.0f} %"}
        for method, column in METHODS.items():
            square = "activations" if method == "whitened SVD" else method
            blast = scores(ratio, "blast", "[16, 16]", square)
            line[column] = f"{blast}, {scores(ratio, 'low_rank', 'None', method)}"
        table.append(line)
    which = "BLAST 16x16 (beside whitened SVD: on activations alone), then low-rank"
    return f"{which}; {' / '.join(texts)}:\n\n{format_table(table)}"
