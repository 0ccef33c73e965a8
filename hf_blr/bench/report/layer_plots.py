"""Plots of `bench layers`, of the first model's first layer."""

from __future__ import annotations

from types import ModuleType
from typing import TYPE_CHECKING

from hf_blr.bench.peaks import predictions
from hf_blr.bench.report.lines import grouped, label_of, storage_of
from hf_blr.bench.report.plots import INK, Looks, add_legend, with_legend
from hf_blr.formats import PLAIN
from hf_blr.roofline.devices import Peaks

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def speed_up(plt: ModuleType, rows: list[dict]) -> Figure:
    """One line for each structure, pair of block counts and format."""
    lines = grouped((row for row in forwards(rows) if row["impl"] == "hf_blr"), form_of)
    figure, (axes,) = with_legend(plt, 1, len(lines), 3)
    looks = Looks()
    for label, mine in lines.items():
        points = sorted((row["tokens"], row["speedup_vs_dense"]) for row in mine)
        axes.plot(*zip(*points, strict=True), **looks(mine[0]["structure"]), label=label)
    axes.axhline(1, color=INK, linewidth=1)
    axes.set(xscale="log", xlabel="tokens", ylabel="speed over dense", title=layer_of(rows))
    ticks = sorted({row["tokens"] for mine in lines.values() for row in mine})
    axes.set_xticks(ticks, list(map(str, ticks)))
    axes.minorticks_off()
    add_legend(figure, 3)
    return figure


def roofline(plt: ModuleType, rows: list[dict], device: Peaks) -> Figure:
    """Operations a second against operations per byte of memory traffic, under the device's ceilings.

    A line for each form, a point for each number of tokens, which dense's points name.
    """
    lines = grouped(predictions(forwards(rows), device), form_of)
    figure, (axes,) = with_legend(plt, 1, len(lines), 3)
    looks = Looks()
    for label, mine in lines.items():
        mine = sorted(mine, key=lambda row: row["tokens"])
        x, y = [row["flops"] / row["bytes"] for row in mine], [row["flops"] / row["us"] / 1e6 for row in mine]
        axes.plot(x, y, **looks(mine[0]["structure"]) | {"linewidth": 1}, label=label)
        if mine[0]["structure"] == "dense":
            for row, place in zip(mine, zip(x, y, strict=True), strict=True):
                said = f"{row['tokens']}" + " token" * (row["tokens"] == 1)
                # the last is near the one before it, and has room above
                offset = (-2, 9) if row is mine[-1] else (5, -12)
                axes.annotate(said, place, offset, textcoords="offset points", fontsize=8)
    intensity = [2**i for i in range(-1, 13)]
    ceiling = [min(device.flops, i * device.bandwidth) / 1e12 for i in intensity]
    axes.plot(intensity, ceiling, color=INK, linewidth=2)
    axes.set(xscale="log", yscale="log", xlabel="operations per byte", ylabel="TFLOP/s", title=layer_of(rows))
    axes.set_ylim(top=2e-12 * device.flops)
    add_legend(figure, 3)
    return figure


def form_of(row: dict) -> str:
    """`blast 4x4`, with the format where factors are kept in bits."""
    return label_of(row) if storage_of(row) == PLAIN.name else f"{label_of(row)} {storage_of(row)}"


def forwards(rows: list[dict]) -> list[dict]:
    """Of the first layer."""
    first = rows[0]["model"], rows[0]["layer"]
    return [row for row in rows if (row["model"], row["layer"]) == first and row["direction"] == "forward"]


def layer_of(rows: list[dict]) -> str:
    return f"{rows[0]['model']} {rows[0]['layer']}".strip()
