"""Plots of `bench layers`."""

from __future__ import annotations

from hf_blr.bench.peaks import predictions
from hf_blr.bench.report.plots import COLOURS, SIZE, Looks, add_legend, with_legend
from hf_blr.roofline.devices import DEVICES


def speed_up(plt, rows: list[dict]):
    """One line for each structure and pair of block counts, of the first model's first layer."""
    first = rows[0]["model"], rows[0]["layer"]
    lines: dict[tuple, list] = {}
    for row in rows:
        if (row["model"], row["layer"]) == first and row["impl"] == "hf_blr" and row["direction"] == "forward":
            blocks = "" if row["blocks"] == [1, 1] else " {}x{}".format(*row["blocks"])
            lines.setdefault((row["structure"], blocks), []).append((row["tokens"], row["speedup_vs_dense"]))
    figure, (axes,) = with_legend(plt, 1, len(lines), 3)
    looks = Looks()
    for (structure, blocks), points in lines.items():
        axes.plot(*zip(*sorted(points), strict=True), **looks(structure), label=f"{structure}{blocks}")
    axes.axhline(1, color=COLOURS["dense"], linewidth=1)
    axes.set(xscale="log", xlabel="tokens", ylabel="speed over dense", title=f"{first[0]} {first[1]}".strip())
    ticks = sorted({tokens for points in lines.values() for tokens, _ in points})
    axes.set_xticks(ticks, list(map(str, ticks)))
    axes.minorticks_off()
    add_legend(figure, 3)
    return figure


def roofline(plt, rows: list[dict]):
    """Operations a second against operations per byte of memory traffic, under the ceilings of an H100."""
    device = DEVICES["H100-measured"]
    figure, axes = plt.subplots(figsize=SIZE, layout="constrained")
    intensity = [2**i for i in range(-1, 13)]
    axes.plot(intensity, [min(device.flops, i * device.bandwidth) / 1e12 for i in intensity], color="black")
    points = predictions(rows, device)
    for structure, colour in COLOURS.items():
        mine = [row for row in points if row["structure"] == structure]
        x, y = [r["flops"] / r["bytes"] for r in mine], [r["flops"] / r["us"] / 1e6 for r in mine]
        if mine:
            axes.scatter(x, y, s=12, color=colour, alpha=0.6, label=structure)
    axes.set(xscale="log", yscale="log", xlabel="operations per byte", ylabel="TFLOP/s")
    axes.legend(fontsize=8)
    return figure
