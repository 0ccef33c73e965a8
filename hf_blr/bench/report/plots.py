"""Which plots result files have the numbers for, and what all plots share. Figures are matplotlib's."""

from __future__ import annotations

import io
import re

from hf_blr.bench.report.tables import kind_of

COLOURS = {
    "dense": "#444444",
    "low_rank": "#1f77b4",
    "pivoted": "#17becf",
    "monarch": "#2ca02c",
    "blast": "#d62728",
    "auto": "#9467bd",
}
STYLES, MARKERS = ("-", "--", ":", "-."), "os^vDPX*"
#: inches; small, so that letters stay readable on a phone
SIZE = (5.5, 3.8)
LEGEND_ROW = 0.21


def pyplot():
    """matplotlib's pyplot, drawing to files. Raises ImportError that says how to install it."""
    try:
        import matplotlib
    except ImportError:
        raise ImportError('plots need matplotlib: pip install "hf-blr[report]", or pass --no-plots') from None
    matplotlib.use("Agg")
    # letters stay letters, and the same data gives the same file
    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "hf_blr", "font.size": 10})
    # a page has many, and all are kept until it is written
    matplotlib.rcParams["figure.max_open_warning"] = 0
    import matplotlib.pyplot as plt

    return plt


def figures(results: dict[str, dict]) -> dict[str, tuple[str, object]]:
    """{name: (caption, figure)} of every plot that these result files have the numbers for."""
    from hf_blr.bench.report.layer_plots import roofline, speed_up
    from hf_blr.bench.report.model_plots import bars, sizes_by_model
    from hf_blr.bench.report.quality_plots import by_bytes, by_method, by_time

    plt, found = pyplot(), {}
    kinds: dict[str | None, dict[str, dict]] = {}
    for name, result in results.items():
        kinds.setdefault(kind_of(result), {})[name] = result

    def add(kind: str, file: str, name: str, caption: str, figure):
        """Under a name of its own, the file's in it where there are several of its kind; no figure, no plot."""
        if figure:
            name += f" {file}" * (len(kinds[kind]) > 1)
            said = f"{caption} {device_of(results[file])}".strip()
            found[re.sub(r"[^A-Za-z0-9._]+", "-", name)] = said, figure

    for file, result in kinds.get("layers", {}).items():
        rows = result["rows"]
        add("layers", file, "speed-up", "Speed over dense against tokens.", speed_up(plt, rows))
        if "H100" in device_of(result):
            add("layers", file, "roofline", "Measured rates under the ceilings of the card.", roofline(plt, rows))
    for file, result in kinds.get("quality", {}).items():
        rows = result["rows"]
        add("quality", file, "quality", "Perplexity against bytes; the lower left is best.", by_bytes(plt, rows))
        add("quality", file, "methods", "What each method makes of a structure.", by_method(plt, rows))
    for file, result in kinds.get("models", {}).items():
        rows = result["rows"]
        scored = kinds.get("quality", {})
        for name, quality in scored.items():
            caption = "Perplexity against milliseconds; the lower left is best."
            name = "quality-time" + f" {name}" * (len(scored) > 1)
            add("models", file, name, caption, by_time(plt, quality["rows"], rows))
        for (measurement, model), sizes in sizes_by_model(rows).items():
            title = f"{model}, {measurement}"
            add("models", file, f"{measurement} {model}", f"{title}.", bars(plt, sizes, title))
    return found


def device_of(result: dict) -> str:
    return result.get("environment", {}).get("device", "")


def structure_of(variant: str) -> str:
    """`blast` of `blast:4x4+fused`."""
    return re.split("[:+]", variant)[0]


class Looks:
    """A colour for each structure; lines of one structure differ in dashes and markers."""

    def __init__(self):
        self.seen: dict[str, int] = {}

    def __call__(self, structure: str | None) -> dict:
        structure = structure or "dense"
        number = self.seen[structure] = self.seen.get(structure, -1) + 1
        return look(COLOURS.get(structure, COLOURS["auto"]), number)


def look(colour: str, number: int) -> dict:
    """Of the line with that number."""
    style, marker = STYLES[number % len(STYLES)], MARKERS[number % len(MARKERS)]
    return {"color": colour, "linestyle": style, "marker": marker, "markersize": 5}


def plain_numbers(axis):
    """20, 30 and 40 on a logarithmic axis, instead of powers of ten."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=(1, 2, 3, 4, 6)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def with_legend(plt, panels: int, labels: int, columns: int = 2):
    """(figure, axes of each panel) with room below for a legend of that many labels, which `add_legend` draws."""
    height = SIZE[1] * panels + LEGEND_ROW * -(-labels // columns)
    figure, grid = plt.subplots(panels, 1, figsize=(SIZE[0], height), layout="constrained", squeeze=False)
    return figure, grid[:, 0]


def add_legend(figure, columns: int = 2):
    """Below all panels, each label once."""
    entries: dict[str, object] = {}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    figure.legend(entries.values(), entries.keys(), loc="outside lower center", ncols=columns, fontsize=8)


def as_svg(figure) -> str:
    """The figure as an element that can stand in a page."""
    text = io.StringIO()
    # without a date: the same numbers give the same page
    figure.savefig(text, format="svg", metadata={"Date": None})
    svg = text.getvalue()
    return svg[svg.index("<svg") :]
