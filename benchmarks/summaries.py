"""Short tables of quality and of whole models: for the README a line for each choice that a user has, two for NOTES."""

from __future__ import annotations

from collections.abc import Iterator

from hf_blr.bench.model_peaks import sizes_of_row
from hf_blr.bench.models import SHAPES
from hf_blr.bench.report.tables import by_size
from hf_blr.cli.table import format_table
from hf_blr.roofline.devices import DEVICES
from hf_blr.roofline.whole_models import forward_parts, step_parts

METHODS = {
    "whitened SVD": "whitened SVD",
    "ours": "ours",
    "ours, block-joint": "+ blocks",
    "ours, refined": "refined",
    "ours, block-joint, refined": "+ blocks, refined",
}
VARIANTS = {"low_rank": "low-rank", "monarch:4x4": "Monarch 4x4", "blast:4x4": "BLAST 4x4", "pivoted": "pivoted"}
PAPERS = {"low_rank:paper": "low-rank", "monarch:paper": "Monarch", "blast:paper": "BLAST"}


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
    for line, found in lines_of(rows):
        shown = {title: found[variant] for variant, title in VARIANTS.items() if variant in found}
        if shown:
            memory = [row["peak / dense"] for row in shown.values()]
            line |= {title: speed(shown.get(title)) for title in VARIANTS.values()}
            table.append(line | {"peak memory": f"{min(memory):.2f} to {max(memory):.2f}"})
        if "dense+attention" in found:
            size = f"{line['model']}, {line['batch x tokens']}"
            attending.append(f"{size}, {found['dense+attention']['ms']:.2f} ms")
    also = f" Dense with the attention of fused models: {'; '.join(attending)}." if attending else ""
    return f"{format_table(table)}\n\n\\* with `hf_blr.fuse`. Peak memory is that of dense.{also}"


def papers_summary(rows: list[dict]) -> str:
    """As `models_summary`, at the ranks and blocks of the paper, and what these keep of a model's projections."""
    numbers = {(row["model"], row["variant"].removesuffix("+fused")): row["projection_parameters"] for row in rows}
    table = []
    for line, found in lines_of(rows):
        model = line["model"]
        kept = {v: numbers[model, v] / numbers[model, "dense"] for v in PAPERS if v in found}
        entries = {PAPERS[v]: f"{speed(found[v])} ({100 * share:.0f} %)" for v, share in kept.items()}
        if entries:
            table.append(line | {title: entries.get(title, "") for title in PAPERS.values()})
    return f"{format_table(table)}\n\n\\* with `hf_blr.fuse`; in brackets what is kept of all projections."


def lines_of(rows: list[dict]) -> Iterator[tuple[dict, dict[str, dict]]]:
    """(the first columns, {variant: row of `by_size`}) of each measurement, model and size with a dense row."""
    for measurement in ("prefill", "decode", "training"):
        for (model, size), found in by_size(rows, measurement).items():
            if "dense" in found:
                dense = f"{found['dense']['ms']:.2f}"
                yield {"": measurement, "model": model, "batch x tokens": size, "dense, ms": dense}, found


def speed(row: dict | None) -> str:
    """Over dense, with a mark where it is fused; nothing of no row."""
    return f"{row['speed over dense']:.2f}x" + "*" * row["variant"].endswith("+fused") if row else ""


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
