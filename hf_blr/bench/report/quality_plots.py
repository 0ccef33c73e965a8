"""Plots of perplexities: against bytes and bits, by method, and against milliseconds measured elsewhere."""

from __future__ import annotations

from collections import Counter
from types import ModuleType
from typing import TYPE_CHECKING

from hf_blr.bench.report.lines import label_of, variant_of
from hf_blr.bench.report.model_tables import in_words
from hf_blr.bench.report.plots import INK, SIZE, label_points, look
from hf_blr.bench.report.quality_panels import Measure, looks_of, panels
from hf_blr.bench.report.quality_tables import in_bits, main_method, plain, scored, usable
from hf_blr.bench.report.timed import timed_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: structures whose methods are compared, at most
STRUCTURES_BY_METHOD = 2
#: structures that a plot of perplexity against time needs
FEWEST_STRUCTURES = 3


def by_bytes(plt: ModuleType, rows: list[dict]) -> Figure | None:
    """A panel for each model and text, a line for each structure with plain factors, of the method of most rows.

    None where no row can be shown.
    """
    rows = usable(plain(rows))
    if not rows:
        return None
    main = main_method(rows)
    shown = [row for row in rows if row.get("method") == main or row.get("structure") is None]
    looks = looks_of(shown)
    return panels(
        plt,
        shown,
        lambda row: label_of(row) or row.get("method") or "dense",
        lambda row: f"{row.get('model')} on {row.get('dataset')}",
        lambda row: looks[label_of(row) or row.get("method") or ""],
    )


def by_bits(plt: ModuleType, rows: list[dict]) -> Figure | None:
    """A panel for each text of the model with most rows in bits, a line for each structure and share kept.

    Each point of a line is a format; of "auto" it is a budget. None where nothing is stored in bits.
    """
    stored = [row for row in usable(rows) if in_bits(row)]
    if not stored:
        return None
    (model, _), *_ = Counter(row.get("model") for row in stored).most_common(1)
    shown = [row for row in stored if row.get("model") == model]
    looks = looks_of(shown)

    def line(row: dict) -> str:
        share = "" if row["ratio"] == 1 else f" {100 * row['ratio']:.0f} %"
        return f"{label_of(row)}{share}, {row['method']}"

    return panels(
        plt,
        shown,
        line,
        lambda row: f"{model} on {row.get('dataset')}",
        lambda row: looks[label_of(row)] | {"linestyle": "-" if row["ratio"] == 1 else "--"},
        Measure("bits a weight", lambda row: row["bits"]),
    )


def by_method(plt: ModuleType, rows: list[dict]) -> Figure | None:
    """A panel for each of the structures with most methods, on the first text, a line for each method.

    None where no structure was fitted by more than one.
    """
    rows = [row for row in usable(plain(rows)) if row.get("structure")]
    rows = [row for row in rows if row.get("dataset") == rows[0].get("dataset")]
    methods: dict[str, set] = {}
    for row in rows:
        methods.setdefault(label_of(row), set()).add(row.get("method"))
    chosen = sorted((name for name in methods if len(methods[name]) > 1), key=lambda name: -len(methods[name]))
    chosen = chosen[:STRUCTURES_BY_METHOD]
    if not chosen:
        return None
    shown = [row for row in rows if label_of(row) in chosen]
    numbers = {method: i for i, method in enumerate(dict.fromkeys(row.get("method") for row in shown))}
    return panels(
        plt,
        sorted(shown, key=lambda row: chosen.index(label_of(row))),
        lambda row: row.get("method") or "",
        lambda row: f"{label_of(row)}: {row.get('model')} on {row.get('dataset')}",
        lambda row: look(f"C{numbers[row.get('method')]}", numbers[row.get("method")]),
    )


def by_time(plt: ModuleType, quality: list[dict], models: list[dict]) -> Figure | None:
    """Perplexity against the time of a forward and of a decoding step, half of the projections kept, by structure.

    The perplexities may be of another, smaller model than the times: the axes say of which. Of the models that were
    timed, the one with most structures is taken. None where none has `FEWEST_STRUCTURES`.
    """
    halves = [row for row in scored(quality) if row.get("ratio") == 0.5]
    perplexities = {variant_of(row): row for row in halves}
    known = ("dense", *perplexities)
    timed = timed_of([row for row in models if row.get("variant", "").removesuffix("+fused") in known], 0.5)
    sizes = {
        measurement: (size, found)
        for measurement, (size, found) in (timed.sizes.items() if timed else ())
        # as many as are needed, and dense
        if measurement != "training" and len(found) > FEWEST_STRUCTURES
    }
    if timed is None or not sizes:
        return None
    looks = looks_of(halves)
    figure, grid = plt.subplots(
        len(sizes), 1, figsize=(SIZE[0], SIZE[1] * len(sizes)), layout="constrained", squeeze=False
    )
    for axes, (measurement, (size, found)) in zip(grid[:, 0], sizes.items(), strict=True):
        for name in [name for name in perplexities if name in found]:
            row = perplexities[name]
            point = looks[label_of(row)] | {"linestyle": ""}
            axes.plot([found[name]["ms"]], [row["ppl"]], **point, label=label_of(row))
        first = halves[0]
        if first.get("dense_ppl"):
            axes.plot([found["dense"]["ms"]], [first["dense_ppl"]], "o", color=INK, label="dense")
        timed_on = f"{timed.model}, {in_words(measurement, size)}"
        axes.set(xlabel=f"ms, {measurement} of {timed_on}", ylabel=f"perplexity of {first.get('model')}")
        axes.set_title(f"half of the projections kept; {first.get('dataset')}", fontsize=9)
        axes.margins(0.15)
        label_points(figure, axes)
    return figure
