"""The README's short tables of quality and of whole models: a line for each choice that a user has."""

from __future__ import annotations

from hf_blr.cli.table import format_table
from hf_blr.results.tables import compared

METHODS = {"whitened SVD": "whitened SVD", "ours": "ours", "ours, refined": "refined"}
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
    table = []
    for measurement in ("prefill", "decode", "training"):
        lines: dict[tuple, dict] = {}
        for row in compared(rows, measurement):
            size = f"{row['batch']} x {row['tokens']}" if "tokens" in row else f"{row['batch']} x 1"
            line = lines.setdefault((row["model"], size), {})
            name = row["variant"].removesuffix("+fused")
            if name == "dense":
                line["dense, ms"] = f"{row['ms']:.2f}"
            elif PAPERS.get(name, name) in VARIANTS and row["speed over dense"] is not None:
                marks = "†" * (name in PAPERS) + "*" * (name != row["variant"])
                entry = row["speed over dense"], marks, row["peak / dense"] or 1.0
                name = PAPERS.get(name, name)
                line[name] = max(line.get(name, entry), entry)
        for (model, size), line in lines.items():
            found = {title: line.get(name) for name, title in VARIANTS.items()}
            memory = [entry[2] for entry in found.values() if entry]
            table.append(
                {"": measurement, "model": model, "batch x tokens": size, "dense, ms": line.get("dense, ms", "")}
                | {title: f"{entry[0]:.2f}x{entry[1]}" if entry else "" for title, entry in found.items()}
                | {"peak memory": f"{min(memory):.2f} to {max(memory):.2f}" if memory else ""}
            )
    marks = "\\* with `hf_blr.fuse`; † the paper's ranks and blocks."
    return f"{format_table(table)}\n\n{marks} Peak memory is that of dense."
