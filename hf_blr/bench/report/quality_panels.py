"""Panels of perplexities against sizes, and how lines look in them."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import TYPE_CHECKING, NamedTuple

from hf_blr.bench.report.lines import label_of
from hf_blr.bench.report.plots import INK, Looks, add_legend, plain_numbers, with_legend

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Measure(NamedTuple):
    """What a row's size is measured in, and that number of a row."""

    name: str
    of: Callable[[dict], float]


MEGABYTES = Measure("MB", lambda row: row["bytes"] / 1e6)


def panels(
    plt: ModuleType,
    rows: list[dict],
    label: Callable[[dict], str],
    panel: Callable[[dict], str],
    look_of: Callable[[dict], dict],
    size: Measure = MEGABYTES,
) -> Figure:
    """Perplexity against size: of each row `panel` is the title, `label` the line and `look_of` its look."""
    titles, labels = (list(dict.fromkeys(map(name, rows))) for name in (panel, label))
    figure, grid = with_legend(plt, len(titles), len(labels))
    for axes, title in zip(grid, titles, strict=True):
        mine = [row for row in rows if panel(row) == title]
        for name in labels:
            line = sorted((row for row in mine if label(row) == name), key=size.of)
            if line:
                points = [size.of(row) for row in line], [row["ppl"] for row in line]
                axes.plot(*points, **look_of(line[0]), label=name)
        for ppl in {row["dense_ppl"] for row in mine if row.get("dense_ppl")}:
            axes.axhline(ppl, color=INK, linewidth=1)
        axes.set(yscale="log", xlabel=size.name, ylabel="perplexity", title=title)
        plain_numbers(axes.yaxis)
    add_legend(figure)
    return figure


def looks_of(rows: list[dict]) -> dict[str, dict]:
    """{label: look} of the structures, and of the methods of rows without one."""
    looks = Looks()
    found: dict[str, dict] = {}
    for row in rows:
        name = label_of(row) or row.get("method") or ""
        if name not in found:
            found[name] = looks(row.get("structure"))
    return found
