"""Tables of perplexities: the demo's and the quality benchmark's."""

from __future__ import annotations

import json

from conditions import RESULTS, machine, table_of

from hf_blr.bench.report.commits import commits_of, rows_of
from hf_blr.bench.report.files import read_result
from hf_blr.bench.report.lines import wide
from hf_blr.bench.report.quality_tables import largest_first, quality_columns, quality_lines, score
from hf_blr.markdown import format_table

METHODS = {
    "whitened SVD": "whitened SVD",
    "ours": "ours",
    "ours, block-joint": "+ blocks",
    "ours, refined": "refined",
    "ours, block-joint, refined": "+ blocks, refined",
}


def demo_section() -> str:
    """Sizes and perplexities of the demo, and the conditions."""
    result = json.loads((RESULTS / "demo.json").read_text())
    return (
        f"{format_table(result['rows'])}\n\n{result['conditions']} `{result['command']}`, {result['seconds']:.0f} s in "
        f"all; {machine(result['environment'])}, Python {result['environment']['python']}, "
        f"transformers {result['environment']['transformers']}. `seconds` are those of the fit."
    )


def quality_section() -> str:
    """One line for each size and structure: perplexities fitted and refined, `text / text`, and the fit's seconds."""
    result = read_result(RESULTS / "quality.json")
    rows = rows_of(result)
    texts = texts_of(rows)

    def cell(line):
        seconds = line["seconds"] if line["method"] == "ours" else None
        shown = {"MB": f"{line['MB']:.0f}", METHODS.get(line["method"], "ours"): scores(line, texts)}
        return shown | ({} if seconds is None else {"fit, s": f"{seconds:.0f}"})

    lines = [line for line in quality_lines(rows) if line["structure"] is None or line["method"] in METHODS]
    shown = wide(
        sorted(lines, key=lambda line: (-line["ratio"], line["structure"] or "", numbers(line["blocks"]))),
        lambda line: {
            "kept": line["kept"],
            "layers": f"{line['structure'] or line['method']} {line['blocks']}".strip(),
        },
        cell,
    )
    columns = ["kept", "layers", "MB", *METHODS.values(), "fit, s"]
    table, where = table_of(shown, rows, result, columns)
    return f"Perplexity on {' / '.join(texts)}:\n\n{table}\n\n{quality_conditions(result, where)}"


def square_blast_section() -> str:
    """The most accurate structure beside low-rank."""
    result = read_result(RESULTS / "quality.json")
    rows = rows_of(result)
    table, where = table_of(square_blast(rows), rows, result)
    said = f"BLAST 16x16 (beside whitened SVD: on activations alone), then low-rank; {' / '.join(texts_of(rows))}:"
    return f"{said}\n\n{table}\n\n{quality_conditions(result, where)}"


def square_blast(rows: list[dict]) -> list[dict]:
    """BLAST 16x16 and low-rank at every size and stage: perplexities, `text / text` of the one, then of the other."""
    texts, lines = texts_of(rows), quality_lines(rows)
    found = {(line["kept"], line["structure"], line["blocks"], line["method"]): line for line in lines}
    table = []
    for kept in dict.fromkeys(line["kept"] for line in largest_first(lines) if line["structure"]):
        cells, used = {"kept": kept}, []
        for method, column in METHODS.items():
            square = "activations" if method == "whitened SVD" else method
            both = (found.get((kept, "blast", "16 x 16", square)), found.get((kept, "low_rank", "", method)))
            shown = [line if line and complete(line, texts) else None for line in both]
            cells[column] = ", ".join(scores(line, texts) if line else "-" for line in shown)
            used += filter(None, shown)
        table.append(cells | {"commit": commits_of(used)})
    return table


def quality_rows_section() -> str:
    """All rows of the quality benchmark, one line for each method and size, a column for each text."""
    result = read_result(RESULTS / "quality.json")
    rows = rows_of(result)
    lines = largest_first(quality_lines(rows))
    table, where = table_of(lines, rows, result, quality_columns(rows, lines))
    return f"{table}\n\n{quality_conditions(result, where)}"


def texts_of(rows: list[dict]) -> list[str]:
    return list(dict.fromkeys(row["dataset"] for row in rows))


def scores(line: dict, texts: list[str]) -> str:
    """`17.62 / 41.60`."""
    return " / ".join(score(line[f"{text} ppl"]) for text in texts if f"{text} ppl" in line)


def complete(line: dict, texts: list[str]) -> bool:
    """Whether it was scored on all texts."""
    return all(f"{text} ppl" in line for text in texts)


def numbers(blocks: str) -> list[int]:
    return [int(part) for part in blocks.split(" x ") if part]


def quality_conditions(result: dict, where: str) -> str:
    models = ", ".join(dict.fromkeys(row["model"] for row in result["rows"]))
    shared = max(row.get("statistics_seconds", 0.0) for row in result["rows"])
    return (
        f"{models}; {result['protocol']}. Seconds are those of the fit, or of the refinement, and missing where two "
        f"runs shared the GPU; the statistics that all fits share took {shared:.0f} s. "
        f"{where}."
    )
