"""Which plots result files have the numbers for. Figures are matplotlib's."""

from __future__ import annotations

import re
from collections.abc import Iterator
from types import ModuleType
from typing import TYPE_CHECKING, NamedTuple

from hf_blr.bench.report.conditions import card_of, kind_of, measured_peaks
from hf_blr.bench.report.plots import as_svg, pyplot

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Plot(NamedTuple):
    """A figure.

    Args:
        caption: what it shows, and on which card.
        figure: matplotlib's.
        svg: the figure as an element of a page.
        question: the key of the one that it answers, see `sections.QUESTIONS`.
        card: that its numbers were measured on.
        lead: shown at once; others are folded.
    """

    caption: str
    figure: Figure
    svg: str
    question: str
    card: str
    lead: bool = True


def figures(results: dict[str, dict]) -> dict[str, Plot]:
    """{name: plot} of all that these result files have the numbers for; the file's name in it where there are several
    of its kind."""
    plt, found = pyplot(), {}
    kinds: dict[str | None, dict[str, dict]] = {}
    for file, result in results.items():
        kinds.setdefault(kind_of(result), {})[file] = result
    quality = kinds.get("quality", {})
    for kind, draw in (("quality", of_quality), ("models", of_models), ("layers", of_layers)):
        for file, result in kinds.get(kind, {}).items():
            for name, caption, figure, question, *lead in draw(plt, result, quality):
                if figure:
                    name += f" {file}" * (len(kinds[kind]) > 1)
                    card = card_of(result)
                    key = re.sub(r"[^A-Za-z0-9._]+", "-", name)
                    found[key] = Plot(f"{caption} {card}".strip(), figure, as_svg(figure, key), question, card, *lead)
    return found


def of_quality(plt: ModuleType, result: dict, quality: dict[str, dict]) -> Iterator[tuple]:
    from hf_blr.bench.report.quality_plots import by_bits, by_bytes, by_method

    yield "bits", "Perplexity against bits a weight; the lower left is best.", by_bits(plt, result["rows"]), "size"
    yield "quality", "Perplexity against bytes; the lower left is best.", by_bytes(plt, result["rows"]), "size"
    yield "methods", "What each method makes of a structure.", by_method(plt, result["rows"]), "size"


def of_models(plt: ModuleType, result: dict, quality: dict[str, dict]) -> Iterator[tuple]:
    from hf_blr.bench.report.model_plots import bars, parts, sizes_by_model
    from hf_blr.bench.report.quality_plots import by_time

    rows = result["rows"]
    for file, scored in quality.items():
        caption = "Perplexity against milliseconds; the lower left is best."
        name = "quality-time" + f" {file}" * (len(quality) > 1)
        yield name, caption, by_time(plt, scored["rows"], rows), "trade"
    drawn = sizes_by_model(rows)
    # the model that was measured most says it all in the first plots; the others would be a wall of bars
    counted: dict[str, int] = {}
    for (_, model), sizes in drawn.items():
        counted[model] = counted.get(model, 0) + sum(map(len, sizes.values()))
    for (measurement, model), sizes in drawn.items():
        title = f"{model}, {measurement}"
        lead = counted[model] == max(counted.values())
        yield f"{measurement} {model}", f"{title}.", bars(plt, sizes, title), "models", lead
    for model, figure in parts(plt, rows):
        lead = counted.get(model) == max(counted.values(), default=None)
        yield f"parts {model}", f"{model}: what its milliseconds are spent on.", figure, "time", lead


def of_layers(plt: ModuleType, result: dict, quality: dict[str, dict]) -> Iterator[tuple]:
    from hf_blr.bench.report.layer_plots import roofline, speed_up

    rows, peaks = result["rows"], measured_peaks(card_of(result))
    yield "speed-up", "Speed over dense against tokens.", speed_up(plt, rows), "layers"
    if peaks:
        caption = (
            "Measured rates under the ceilings of the card: a line for each form, a point for each number of tokens."
        )
        yield "roofline", caption, roofline(plt, rows, peaks), "predicted"
