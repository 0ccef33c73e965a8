"""Plots of `bench model`: a figure for each model and measurement."""

from __future__ import annotations

from hf_blr.bench.report.plots import COLOURS, SIZE, structure_of
from hf_blr.bench.report.tables import by_size

#: inches of one bar, or of one heading
BAR = 0.19


def sizes_by_model(rows: list[dict]) -> dict[tuple[str, str], dict[str, dict[str, dict]]]:
    """{(measurement, model): {size: {variant: row}}} of `by_size`, of models that have more than dense."""
    found: dict[tuple[str, str], dict] = {}
    good = [row for row in rows if "error" not in row]
    for measurement in ("prefill", "decode", "training"):
        for (model, size), group in by_size(good, measurement).items():
            if measurement == "decode":
                size = texts(next(iter(group.values()))["batch"])
            found.setdefault((measurement, model), {})[size] = group
    return {
        key: sizes
        for key, sizes in found.items()
        if any(set(map(structure_of, s)) != {"dense"} for s in sizes.values())
    }


def texts(number: int) -> str:
    return f"{number} text{'s' * (number > 1)}"


def bars(plt, sizes: dict[str, dict[str, dict]], title: str):
    """Time of each variant as a share of dense's, under a heading for each size."""
    count = sum(len(group) + 1 for group in sizes.values())
    figure, axes = plt.subplots(figsize=(SIZE[0], 1.0 + BAR * count), layout="constrained")
    places, names, place = [], [], 0
    for size, group in sizes.items():
        axes.text(0, place, size, fontsize=8, fontweight="bold", va="center")
        for name in sorted(group, key=order):
            place += 1
            places.append(place)
            names.append(name)
            line = group[name]
            # without a dense row there is nothing to compare with, and the bar has a number alone
            share = 1 / line["speed over dense"] if line["speed over dense"] else 0.0
            colour = COLOURS.get(structure_of(name), COLOURS["auto"])
            (bar,) = axes.barh([place], [share], height=0.8, color=colour, alpha=0.85)
            axes.annotate(
                said_of(line), (bar.get_width(), place), (3, 0), textcoords="offset points", va="center", size=7
            )
        place += 1
    axes.set_yticks(places, names, fontsize=7)
    axes.set_ylim(place - 0.4, -0.8)
    axes.axvline(1, color=COLOURS["dense"], linewidth=1)
    axes.set(xlabel="time, dense = 1", title=title)
    axes.margins(x=0.3)
    return figure


def said_of(line: dict) -> str:
    speed = line["speed over dense"]
    return f"{line['ms']:.3g} ms" + (f", {speed:.2f}x" if speed and speed != 1 else "")


def order(name: str) -> tuple:
    """Dense first, then by structure as in all plots."""
    structures = list(COLOURS)
    structure = structure_of(name)
    return structures.index(structure) if structure in structures else len(structures), name
