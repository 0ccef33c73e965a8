"""The sections of the page: one for each question, with help to read it, its plots and its tables, card by card."""

from __future__ import annotations

from dataclasses import dataclass, field

from hf_blr.bench.report.figures import Plot
from hf_blr.bench.report.tables import Table

#: {key: (title, how to read what stands below it)}
QUESTIONS = {
    "size": (
        "How much smaller, and how much worse?",
        "Each line is one structure, each point one size of it: the further to the left the smaller, the lower the "
        "better. The thin line is the dense model.",
    ),
    "trade": (
        "How much worse for how much speed?",
        "Each point is one structure at the same share of kept parameters: the lower left is best. Time and perplexity "
        "may be of different models, so compare the points with each other and read the axes.",
    ),
    "models": (
        "How much faster: whole models?",
        "A bar that ends left of the line is faster than the dense model, at equal input. Dense and compressed models "
        "are each shown in the fastest form that was measured.",
    ),
    "layers": (
        "How much faster: one layer?",
        "Above the line a compressed layer beats the dense one. Few tokens are limited by reading weights, many by "
        "arithmetic and the start of each kernel.",
    ),
    "time": (
        "Where does the time go?",
        "Each bar is one forward or one decoding step, cut into what its kernels do. Only projections shrink when a "
        "model is compressed; the rest stays.",
    ),
    "predicted": (
        "How well does the roofline predict?",
        "The line is the most that the card can do at a given number of operations per byte; points are layers that "
        "were measured. The tables count how many predictions are within 25 %.",
    ),
    "failed": (
        "What failed?",
        "These cases were tried and gave no number. The last column is what they said.",
    ),
    "other": (
        "What else was measured?",
        "Studies of single questions, as their rows are. They stand under the name of their file.",
    ),
}


@dataclass
class OnCard:
    """What answers one question on one card."""

    card: str
    plots: list[Plot] = field(default_factory=list)
    more_plots: list[Plot] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)


@dataclass
class Section:
    key: str
    title: str
    help: str
    cards: list[OnCard]


def sections(tables: list[Table], plots: list[Plot]) -> list[Section]:
    """Those with something in them, in the order of `QUESTIONS`."""
    found = []
    for key, (title, help) in QUESTIONS.items():
        cards: dict[str, OnCard] = {}
        for plot in plots:
            if plot.question == key:
                here = cards.setdefault(plot.card, OnCard(plot.card))
                (here.plots if plot.lead else here.more_plots).append(plot)
        for table in tables:
            if table.question == key:
                cards.setdefault(table.card, OnCard(table.card)).tables.append(table)
        if cards:
            found.append(Section(key, title, help, list(cards.values())))
    return found
