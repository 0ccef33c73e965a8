"""Plots of result files, as matplotlib figures."""

from __future__ import annotations

import io

from hf_blr.bench.ceilings import predictions
from hf_blr.evaluation.devices import DEVICES
from hf_blr.results.tables import compared, kind_of

COLOURS = {
    "dense": "#444444",
    "low_rank": "#1f77b4",
    "pivoted": "#17becf",
    "monarch": "#2ca02c",
    "blast": "#d62728",
    "auto": "#9467bd",
}
STYLES, MARKERS = ("-", "--", ":", "-."), "os^vDP"
#: inches; small, so that letters stay readable on a phone
SIZE = (5.5, 3.8)


def pyplot():
    """matplotlib's pyplot, drawing to files. Raises ImportError that says how to install it."""
    try:
        import matplotlib
    except ImportError:
        raise ImportError('plots need matplotlib: pip install "hf-blr[report]", or pass --no-plots') from None
    matplotlib.use("Agg")
    # letters stay letters, and the same data gives the same file
    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "hf_blr", "font.size": 10})
    import matplotlib.pyplot as plt

    return plt


def figures(results: dict[str, dict]) -> dict[str, tuple[str, object]]:
    """{name: (caption, figure)} of every plot that these result files have the numbers for."""
    plt, found = pyplot(), {}
    for result in results.values():
        kind, rows = kind_of(result), result["rows"]
        device = result.get("environment", {}).get("device", "")
        if kind == "layers":
            found["speed-up"] = f"Speed over dense against tokens. {device}", speed_up(plt, rows)
            if "H100" in device:
                found["roofline"] = f"Measured rates under the ceilings of the card. {device}", roofline(plt, rows)
        if kind == "models":
            for measurement in ("prefill", "decode"):
                lines = compared([r for r in rows if "error" not in r], measurement)
                if lines:
                    found[measurement] = (
                        f"{measurement.title()} of whole models. {device}",
                        bars(plt, lines, measurement),
                    )
        if kind == "quality":
            found["quality"] = "Perplexity against bytes; the lower left is best.", quality(plt, rows)
    return found


def speed_up(plt, rows: list[dict]):
    """One line for each structure and pair of block counts, of the first model's first layer."""
    first = rows[0]["model"], rows[0]["layer"]
    lines: dict[tuple, list] = {}
    for row in rows:
        if (row["model"], row["layer"]) == first and row["impl"] == "hf_blr" and row["direction"] == "forward":
            key = row["structure"], "{}x{}".format(*row["blocks"])
            lines.setdefault(key, []).append((row["tokens"], row["speedup_vs_dense"]))
    figure, axes = plt.subplots(figsize=SIZE, layout="constrained")
    seen: dict[str, int] = {}
    for (structure, blocks), points in lines.items():
        style = STYLES[seen.setdefault(structure, 0) % len(STYLES)]
        seen[structure] += 1
        label = structure if structure == "low_rank" else f"{structure} {blocks}"
        axes.plot(*zip(*sorted(points), strict=True), style, marker="o", color=COLOURS[structure], label=label)
    axes.axhline(1, color=COLOURS["dense"], linewidth=1)
    axes.set(xscale="log", xlabel="tokens", ylabel="speed over dense", title=f"{first[0]} {first[1]}".strip())
    axes.legend(fontsize=8, ncols=2)
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
        axes.scatter(x, y, s=12, color=colour, alpha=0.6, label=structure)
    axes.set(xscale="log", yscale="log", xlabel="operations per byte", ylabel="TFLOP/s")
    axes.legend(fontsize=8)
    return figure


def bars(plt, lines: list[dict], measurement: str):
    """Milliseconds of each variant, one group a model, batch and number of tokens."""
    groups = list(dict.fromkeys(group_of(line) for line in lines))
    variants = list(dict.fromkeys(line["variant"] for line in lines))
    # groups differ by orders of magnitude, so dense is one in each
    times = {(group_of(r), r["variant"]): 1 / r["speed over dense"] for r in lines if r["speed over dense"]}
    shown = {(group_of(r), r["variant"]): r["ms"] for r in lines}
    figure, axes = plt.subplots(figsize=(SIZE[0], 1.6 + 0.22 * len(groups) * (len(variants) + 1)), layout="constrained")
    shades: dict[str, int] = {}
    for index, variant in enumerate(variants):
        structure = variant.partition(":")[0]
        shade = shades[structure] = shades.get(structure, -1) + 1
        heights = [times.get((group, variant), 0) for group in groups]
        places = [i * (len(variants) + 1) + index for i in range(len(groups))]
        drawn = axes.barh(places, heights, color=COLOURS[structure], alpha=1 - 0.25 * min(shade, 3), label=variant)
        labels = [f"{shown[group, variant]:.3g} ms" if (group, variant) in shown else "" for group in groups]
        axes.bar_label(drawn, labels, fontsize=7, padding=2)
    axes.set_yticks([i * (len(variants) + 1) + (len(variants) - 1) / 2 for i in range(len(groups))], groups, fontsize=8)
    axes.invert_yaxis()
    axes.axvline(1, color=COLOURS["dense"], linewidth=1)
    axes.set(xlabel=f"{measurement} time, dense = 1")
    axes.margins(x=0.15)
    figure.legend(loc="outside lower center", ncols=3, fontsize=8)
    return figure


def group_of(line: dict) -> str:
    tokens = f" x {line['tokens']}" if "tokens" in line else ""
    return f"{line['model']}\n{line['batch']}{tokens}"


def quality(plt, rows: list[dict]):
    """Perplexity against bytes, a panel for each model and text."""
    rows = [row for row in rows if row.get("ppl") and row.get("bytes")]
    panels = list(dict.fromkeys((row.get("model"), row.get("dataset")) for row in rows)) or [(None, None)]
    figure, grid = plt.subplots(
        len(panels), 1, figsize=(SIZE[0], SIZE[1] * len(panels)), layout="constrained", squeeze=False
    )
    for axes, panel in zip(grid[:, 0], panels, strict=True):
        mine = [row for row in rows if (row.get("model"), row.get("dataset")) == panel]
        seen: dict[str | None, int] = {}
        for key in dict.fromkeys(quality_key(row) for row in mine):
            structure, blocks, method = key
            points = sorted((row["bytes"] / 1e6, row["ppl"]) for row in mine if quality_key(row) == key)
            # one colour a structure; its methods differ in line and marker
            number = seen[structure] = seen.get(structure, -1) + 1
            look = {"linestyle": STYLES[number % len(STYLES)], "marker": MARKERS[number % len(MARKERS)]}
            label = " ".join(part for part in (structure, blocks, method) if part)
            axes.plot(*zip(*points, strict=True), **look, color=COLOURS[structure or "dense"], label=label)
        for ppl in {row["dense_ppl"] for row in mine if row.get("dense_ppl")}:
            axes.axhline(ppl, color=COLOURS["dense"], linewidth=1)
        axes.set(yscale="log", xlabel="MB", ylabel="perplexity", title=" on ".join(part for part in panel if part))
        axes.legend(fontsize=8)
    return figure


def quality_key(row: dict) -> tuple[str | None, str, str | None]:
    """What one line of the plot shows: structure, blocks, method."""
    blocks = row.get("blocks")
    return row.get("structure"), "{}x{}".format(*blocks) if blocks else "", row.get("method")


def as_svg(figure) -> str:
    """The figure as an element that can stand in a page."""
    text = io.StringIO()
    # without a date: the same numbers give the same page
    figure.savefig(text, format="svg", metadata={"Date": None})
    svg = text.getvalue()
    return svg[svg.index("<svg") :]
