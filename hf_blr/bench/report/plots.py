"""What all plots share: colours, lines, legends, labels of points."""

from __future__ import annotations

import io
from types import ModuleType
from typing import TYPE_CHECKING, Any

from hf_blr.structures import structures

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure
    from matplotlib.transforms import Bbox
    from numpy import ndarray

#: letters and axes: in a page this becomes the colour of the text around the plot, so that it is read in the dark too
INK = "#1b1f24"
#: of rows of a structure that is not known here, or of one chosen for each layer
OTHER = "#9467bd"
STYLES, MARKERS = ("-", "--", ":", "-."), "os^vDPX*"
#: inches; small, so that letters stay readable on a phone
SIZE = (4.6, 3.4)
LEGEND_ROW = 0.21
#: where a point's label may stand, in points from it, the first that is free: right, left, above, below, corners
PLACES = (
    (7, -3),
    (-7, -3),
    (0, 7),
    (0, -13),
    (6, 6),
    (6, -12),
    (-6, 6),
    (-6, -12),
    (7, 16),
    (7, -24),
    (-7, 16),
    (-7, -24),
)


def colour_of(structure: str) -> str:
    """The colour of a structure, or of dense, in all plots."""
    if structure == "dense":
        return INK
    record = structures().get(structure)
    return OTHER if record is None else record.colour


def pyplot() -> ModuleType:
    """matplotlib's pyplot, drawing to files. Raises ImportError that says how to install it."""
    try:
        import matplotlib
    except ImportError:
        raise ImportError('plots need matplotlib: pip install "hf-blr[report]", or pass --no-plots') from None
    matplotlib.use("Agg")
    inked = ("text.color", "axes.edgecolor", "axes.labelcolor", "axes.titlecolor", "xtick.color", "ytick.color")
    # letters stay letters
    matplotlib.rcParams.update({"svg.fonttype": "none", "font.size": 10, "legend.frameon": False, "axes.titlesize": 10})
    inks: dict[Any, str] = dict.fromkeys(inked, INK)
    matplotlib.rcParams.update(inks)
    # a page has many, and all are kept until it is written
    matplotlib.rcParams["figure.max_open_warning"] = 0
    import matplotlib.pyplot as plt

    return plt


class Looks:
    """A colour for each structure; lines of one structure differ in dashes and markers."""

    def __init__(self) -> None:
        self.seen: dict[str, int] = {}

    def __call__(self, structure: str | None) -> dict:
        structure = structure or "dense"
        number = self.seen[structure] = self.seen.get(structure, -1) + 1
        return look(colour_of(structure), number)


def look(colour: str, number: int) -> dict:
    """Of the line with that number."""
    style, marker = STYLES[number % len(STYLES)], MARKERS[number % len(MARKERS)]
    return {"color": colour, "linestyle": style, "marker": marker, "markersize": 5}


def plain_numbers(axis: Axis) -> None:
    """20, 30 and 40 on a logarithmic axis, instead of powers of ten."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=(1, 2, 3, 4, 6)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def with_legend(plt: ModuleType, panels: int, labels: int, columns: int = 2) -> tuple[Figure, Any]:
    """(figure, axes of each panel) with room below for a legend of that many labels, which `add_legend` draws."""
    height = SIZE[1] * panels + LEGEND_ROW * -(-labels // columns)
    figure, grid = plt.subplots(panels, 1, figsize=(SIZE[0], height), layout="constrained", squeeze=False)
    return figure, grid[:, 0]


def add_legend(figure: Figure, columns: int = 2) -> None:
    """Below all panels, each label once."""
    entries: dict[str, Artist] = {}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    figure.legend(entries.values(), entries.keys(), loc="outside lower center", ncols=columns, fontsize=8)


def label_points(figure: Figure, axes: Any) -> None:
    """Writes each line's label beside its last point, where it covers no other label and no point."""
    figure.canvas.draw()
    taken = [box_of(axes.transData.transform(point), 4) for line in axes.lines for point in line.get_xydata()]
    inside = axes.get_window_extent()
    for line in axes.lines:
        options = {"textcoords": "offset points", "fontsize": 8}
        for x, y in PLACES:
            side = "left" if x > 0 else "right" if x < 0 else "center"
            text = axes.annotate(line.get_label(), line.get_xydata()[-1], (x, y), ha=side, **options)
            box = text.get_window_extent()
            free = inside.x0 <= box.x0 and box.x1 <= inside.x1 and inside.y0 <= box.y0 and box.y1 <= inside.y1
            if (free and not box.count_overlaps(taken)) or (x, y) == PLACES[-1]:
                taken.append(box)
                break
            text.remove()


def box_of(point: ndarray, half: float) -> Bbox:
    from matplotlib.transforms import Bbox

    return Bbox([point - half, point + half])


def as_svg(figure: Figure, name: str = "plot") -> str:
    """The figure as an element that can stand in a page beside those of other names, on any ground."""
    import matplotlib

    text = io.StringIO()
    # names of clips and markers are made from the salt: two plots must not share one, as one may be folded away. And
    # without a date: the same numbers give the same page
    with matplotlib.rc_context({"svg.hashsalt": name}):
        figure.savefig(text, format="svg", metadata={"Date": None}, transparent=True)
    svg = text.getvalue()
    return svg[svg.index("<svg") :]
