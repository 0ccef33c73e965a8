"""The table of mean ratios by size: what each part of a fit, each text and each method gives on four kinds of text."""

from __future__ import annotations

from conditions import RESULTS, table_of
from text_ratio_sections import lettered_lines

from hf_blr.bench.report.commits import commits_of, rows_of
from hf_blr.bench.report.files import read_result
from hf_blr.bench.report.lines import grouped

#: what tells the lines apart
NAMES = ("layers", "method", "fitted to", "trained on")


def means_section(file: str = "quality_h200.json") -> str:
    """One line for each compressed model, whatever its size, and a column for each size."""
    result = read_result(RESULTS / file)
    rows = rows_of(result)
    # the letters are those of the table of all texts
    every = lettered_lines(rows, list(dict.fromkeys(row["dataset"] for row in rows)))[0]
    lines = by_size([line for line in every if line["kept"] != "100 %"])
    table, where = table_of(lines, rows, result, [name for name in lines[0] if name != "commit"])
    return f"{table}\n\nMixtures and conditions as in the table above. {where}."


def by_size(lines: list[dict]) -> list[dict]:
    """Those that differ in nothing but their size as one, with the mean of each size; what loses most first.

    Lines without the smallest size are the last.
    """
    sizes = sorted({line["kept"] for line in lines}, key=lambda kept: -float(kept.removesuffix(" %")))
    found = []
    for alike in grouped(lines, lambda line: tuple(line[name] for name in NAMES)).values():
        means = {line["kept"]: line["mean"] for line in alike}
        line = {name: alike[0][name] for name in NAMES} | {size: means.get(size, "") for size in sizes}
        found.append(line | {"commit": commits_of(alike)})
    return sorted(found, key=lambda line: [-float((line[size] or "0").split()[0]) for size in reversed(sizes)])
