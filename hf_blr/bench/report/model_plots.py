"""Plots of `bench model`: a figure for each model and measurement, and one of where its time goes."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType
from typing import TYPE_CHECKING

from hf_blr.bench.report.lines import grouped, structure_of
from hf_blr.bench.report.model_tables import MEASUREMENTS, by_size, in_words, place_in_profiles
from hf_blr.bench.report.plots import INK, LEGEND_ROW, SIZE, add_legend, colour_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: inches of one bar, or of one heading
BAR = 0.2
#: {name of a bar's part: parts of a profile}
PARTS = {"projections": ("products", "blr"), "attention": ("attention",), "elementwise": ("elementwise",)}
PARTS |= {"between kernels": ("idle",)}


def sizes_by_model(rows: list[dict]) -> dict[tuple[str, str], dict[str, dict[str, dict]]]:
    """{(measurement, model): {size: {variant: row}}} of `by_size`, of models that have more than dense."""
    found: dict[tuple[str, str], dict] = {}
    good = [row for row in rows if "error" not in row]
    for measurement in MEASUREMENTS:
        for (model, size), group in by_size(good, measurement).items():
            found.setdefault((measurement, model), {})[in_words(measurement, size)] = group
    return {
        key: sizes
        for key, sizes in found.items()
        if any(set(map(structure_of, s)) != {"dense"} for s in sizes.values())
    }


def bars(plt: ModuleType, sizes: dict[str, dict[str, dict]], title: str) -> Figure:
    """Time of each variant as a share of dense's, under a heading for each size."""
    count = sum(len(group) + 1 for group in sizes.values())
    figure, axes = plt.subplots(figsize=(SIZE[0], 1.0 + BAR * count), layout="constrained")
    places, names, said, place = [], [], [], 0
    for size, group in sizes.items():
        axes.text(0, place, size, fontsize=9, fontweight="bold", va="center")
        for name in sorted(group, key=dense_first):
            place += 1
            places.append(place)
            names.append(name)
            line = group[name]
            # without a dense row there is nothing to compare with, and the bar has a number alone
            share = 1 / line["speed over dense"] if line["speed over dense"] else 0.0
            axes.barh([place], [share], height=0.8, color=colour_of(structure_of(name)), alpha=0.85)
            said.append((place, said_of(line)))
        place += 1
    axes.set_yticks(places, names, fontsize=8)
    axes.set_ylim(place - 0.4, -0.8)
    axes.axvline(1, color=INK, linewidth=1)
    axes.set(xlabel="time, dense = 1", title=title)
    axes.margins(x=0.42)
    # in a column of their own, where neither bars nor dense's line run through them
    longest = max(1, *(bar.get_width() for bar in axes.patches))
    for place, text in said:
        axes.annotate(text, (longest, place), (5, 0), textcoords="offset points", va="center", size=8)
    return figure


def said_of(line: dict) -> str:
    speed = line["speed over dense"]
    return f"{line['ms']:.3g} ms" + (f", {speed:.2f}x" if speed and speed != 1 else "")


def dense_first(name: str) -> tuple:
    return structure_of(name) != "dense", name


def step_of(row: dict) -> str:
    """`prefill, 1 x 1024`, `decode, 8 texts`."""
    size = in_words(row["measurement"], f"{row['batch']} x {row['tokens']}")
    return f"{row['measurement']}, {size}"


def parts(plt: ModuleType, rows: list[dict]) -> Iterator[tuple[str, Figure]]:
    """(model, figure) of each model with profiles: a bar for each profiled row, cut into what its kernels do."""
    profiled = sorted((row for row in rows if "profile" in row), key=place_in_profiles)
    for model, mine in grouped(profiled, lambda row: row["model"]).items():
        sizes = grouped(mine, step_of)
        height = 0.7 * len(sizes) + BAR * len(mine) + 2 * LEGEND_ROW
        figure, grid = plt.subplots(
            len(sizes),
            figsize=(SIZE[0], height + 0.6),
            layout="constrained",
            squeeze=False,
            height_ratios=[len(group) + 1.5 for group in sizes.values()],
        )
        for axes, (size, group) in zip(grid[:, 0], sizes.items(), strict=True):
            names = [f"{row['variant']}, {row['mode']}" if "mode" in row else row["variant"] for row in group]
            left = [0.0] * len(group)
            for number, (part, keys) in enumerate(PARTS.items()):
                widths = [sum(row["profile"]["parts"][key] for key in keys) for row in group]
                axes.barh(range(len(group)), widths, left=left, height=0.8, color=f"C{number}", label=part)
                left = [a + b for a, b in zip(left, widths, strict=True)]
            for place, total in enumerate(left):
                axes.annotate(
                    f"{total:.3g} ms", (total, place), (3, 0), textcoords="offset points", va="center", size=7
                )
            axes.set_yticks(range(len(group)), names, fontsize=8)
            axes.invert_yaxis()
            axes.set_title(f"{model}, {size}", fontsize=9)
            axes.margins(x=0.25)
        grid[-1, 0].set_xlabel("ms")
        add_legend(figure, 2)
        yield model, figure
