"""Tables of perplexities: the demo's and the quality benchmark's."""

from __future__ import annotations

import json

from conditions import RESULTS, machine, table_of

from hf_blr.bench.report.commits import rows_of
from hf_blr.bench.report.files import read_result
from hf_blr.bench.report.lines import wide
from hf_blr.bench.report.quality_tables import quality_lines, score
from hf_blr.markdown import format_table

#: {structure and blocks: name}
SIZED = {("low_rank", ""): "low-rank", ("pivoted", ""): "pivoted", ("blast", "16 x 16"): "BLAST 16x16"}
FITTED, REFINED = "ours", "ours, refined"
#: {method: its line}: from other papers' methods to the whole fit, each part of it added to what stands above
LADDER = {
    "plain SVD": "plain SVD, without text",
    "whitened SVD": "fitted to activations",
    "activations": "fitted to activations",
    "SVD-LLM with update": "SVD-LLM with update",
    "+ Fisher": "+ weighed by the loss",
    "+ Fisher + shared budget": "+ one budget for all layers",
    "ours": "+ sequential: the whole fit",
    "ours, block-joint": "+ blocks refined",
    "ours, refined": "the whole fit, then refined",
}
LADDER_LAYERS = {("low_rank", ""): "low-rank", ("blast", "4 x 16"): "BLAST 4x16"}
#: the sizes at which shapes and parts of the fit are compared
KEPT = ("80 %", "50 %")
#: the heading under which the conditions stand
SIZES = "Perplexity by structure and size"


def demo_section() -> str:
    """Sizes and perplexities of the demo, and the conditions."""
    result = json.loads((RESULTS / "demo.json").read_text())
    return (
        f"{format_table(result['rows'])}\n\n{result['conditions']} `{result['command']}`, {result['seconds']:.0f} s in "
        f"all; {machine(result['environment'])}, Python {result['environment']['python']}, "
        f"transformers {result['environment']['transformers']}. `seconds` are those of the fit."
    )


def quality_section() -> str:
    """One line for each size: perplexities of three structures, fitted and refined."""
    result, rows, lines = measured()
    texts = texts_of(rows)
    names = {FITTED: "", REFINED: ", refined"}
    shown = wide(
        sorted(
            (line for line in lines if layers_of(line) in SIZED and line["method"] in names),
            key=lambda line: -line["ratio"],
        ),
        lambda line: {"kept": line["kept"]},
        lambda line: {SIZED[layers_of(line)] + names[line["method"]]: scores(line, texts)},
    )
    columns = ["kept", *(name + stage for name in SIZED.values() for stage in names.values())]
    return with_conditions(shown, rows, result, columns)


def shapes_section() -> str:
    """One line for each structure and its blocks, as fitted, a column for each size."""
    result, rows, lines = measured()
    texts = texts_of(rows)
    shown = wide(
        sorted(
            (line for line in lines if line["kept"] in KEPT and line["method"] == FITTED),
            key=lambda line: (line["structure"], numbers(line["blocks"])),
        ),
        lambda line: {"layers": f"{line['structure']} {line['blocks']}".strip()},
        lambda line: {line["kept"]: scores(line, texts)},
    )
    return with_conditions(shown, rows, result, ["layers", *KEPT], SIZES)


def ladder_section() -> str:
    """What each part of the fit gives: a line for each method, a column for each of two structures at two sizes."""
    result, rows, lines = measured()
    texts = texts_of(rows)
    shown = wide(
        sorted(
            (
                line
                for line in lines
                if layers_of(line) in LADDER_LAYERS and line["kept"] in KEPT and line["method"] in LADDER
            ),
            key=lambda line: list(LADDER).index(line["method"]),
        ),
        lambda line: {"method": LADDER[line["method"]]},
        lambda line: {f"{LADDER_LAYERS[layers_of(line)]}, {line['kept']}": scores(line, texts)},
    )
    columns = ["method", *(f"{name}, {kept}" for name in LADDER_LAYERS.values() for kept in KEPT)]
    return with_conditions(shown, rows, result, columns, SIZES)


def measured() -> tuple[dict, list[dict], list[dict]]:
    """The file, its rows, and a line for each method and size with its perplexities on all texts."""
    result = read_result(RESULTS / "quality.json")
    rows = rows_of(result)
    return result, rows, quality_lines(rows)


def with_conditions(lines: list[dict], rows: list[dict], result: dict, columns: list[str], where_else: str = "") -> str:
    """The table between what its cells are and on what they were measured, or under which heading that stands."""
    table, where = table_of(lines, rows, result, columns)
    models = ", ".join(dict.fromkeys(row["model"] for row in rows))
    said = f"Other conditions as under {where_else}" if where_else else f"{models}; {result['protocol']}"
    return f"Perplexity on {' / '.join(texts_of(rows))}:\n\n{table}\n\n{said}. {where}."


def layers_of(line: dict) -> tuple[str | None, str]:
    """The structure and its blocks."""
    return line["structure"], line["blocks"]


def texts_of(rows: list[dict]) -> list[str]:
    return list(dict.fromkeys(row["dataset"] for row in rows))


def scores(line: dict, texts: list[str]) -> str:
    """`17.62 / 41.60`."""
    return " / ".join(score(line[f"{text} ppl"]) for text in texts if f"{text} ppl" in line)


def numbers(blocks: str) -> list[int]:
    return [int(part) for part in blocks.split(" x ") if part]
