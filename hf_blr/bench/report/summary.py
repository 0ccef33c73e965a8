"""The first screen: which form, how small, how much faster, how much worse, and of which model each number is."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from hf_blr.bench.report.commits import commits_of, rows_of
from hf_blr.bench.report.conditions import card_of, kind_of
from hf_blr.bench.report.lines import label_of, structure_of, variant_of
from hf_blr.bench.report.model_tables import in_words
from hf_blr.bench.report.quality_tables import scored
from hf_blr.bench.report.tables import Table, made
from hf_blr.bench.report.timed import Timed, main_ratio, timed_of

#: sizes whose perplexities the summary has, at most
RATIOS = 2


@dataclass(frozen=True)
class Fact:
    """A large number, what it is, and of what."""

    number: str
    what: str
    of: str


@dataclass
class Summary:
    """Facts and a table; `skipped` says which cards it leaves out."""

    facts: list[Fact] = field(default_factory=list)
    table: Table | None = None
    skipped: str = ""


def summarised(results: dict[str, dict]) -> Summary:
    """The summary of these result files: of the card with most rows of whole models, and of the first perplexities."""
    models = [result for result in results.values() if kind_of(result) == "models"]
    cards = Counter({card: 0 for card in map(card_of, models)})
    for result in models:
        cards[card_of(result)] += len(result["rows"])
    card, *others = [card for card, _ in cards.most_common()] or [""]
    mine = [result for result in models if card_of(result) == card]
    rows = [row for result in mine for row in rows_of(result)]
    timed = timed_of(rows, main_ratio(rows))
    quality = [result for result in results.values() if kind_of(result) == "quality"]
    scores = scored(row for result in quality for row in rows_of(result))
    ratios = ratios_of(scores, timed.ratio if timed else None)
    names = names_of(timed, scores, ratios)
    if not names:
        return Summary()
    lines = lines_of(names, timed, scores, ratios)
    said = " ".join([*size_and_speed(timed), *perplexity(scores, ratios)])
    # the table is of one card: what was scored elsewhere says so
    if mine and ratios and card_of(quality[0]) not in ("", card):
        said += f" They were scored on {card_of(quality[0])}."
    rows = [{"commit": commit} for line in lines for commit in line["commit"].split(", ")]
    table = made((mine or quality)[0], rows, "summary", "In short", lines, said)
    skipped = f"Whole models were measured on {' and '.join(others)} too: see below." if others else ""
    return Summary(facts(names, timed, scores, ratios), table, skipped)


def ratios_of(scores: list[dict], timed: float | None) -> list[float]:
    """The ratio of the times first, if there are perplexities at it, then those of most forms."""
    forms = Counter(row["ratio"] for row in scores if row.get("structure") and row.get("ratio"))
    ratios = sorted(forms, key=lambda ratio: (ratio != timed, -forms[ratio], -ratio))
    return sorted(ratios[:RATIOS], reverse=True)


def names_of(timed: Timed | None, scores: list[dict], ratios: list[float]) -> list[str]:
    """Variants that have both times and perplexities, if there are any, or one of them."""
    names = dict.fromkeys(variant_of(row) for row in scores if row["ratio"] in ratios)
    variants = [name for name in timed.variants if structure_of(name) != "dense"] if timed else []
    return [name for name in variants if name in names] or variants or list(names)


def lines_of(names: list[str], timed: Timed | None, scores: list[dict], ratios: list[float]) -> list[dict]:
    """Dense first, then the most accurate."""
    ppl = {(variant_of(row), row["ratio"]): row for row in scores} | {("dense", ratio): scores[0] for ratio in ratios}
    dense, *lines = (line_of(name, timed, ppl, ratios) for name in ("dense", *names))
    return [dense, *sorted(lines, key=by_worth)]


def line_of(name: str, timed: Timed | None, ppl: dict, ratios: list[float]) -> dict:
    line, rows = {"form": spoken(name)}, []
    sizes = timed.sizes if timed else {}
    model = timed.model if timed else ""
    for measurement, (size, found) in sizes.items():
        if row := found.get(name):
            rows.append(row)
            line.setdefault(f"parameters of {model}", share_of_dense(row, found))
        line[column_of(measurement, model, size)] = f"{row['speed over dense']:.2f}x" if row else ""
    for ratio in ratios:
        row = ppl.get((name, ratio), {})
        line[f"perplexity, {100 * ratio:.0f} % kept"] = row.get("dense_ppl" if name == "dense" else "ppl")
        rows += [row] if row and name != "dense" else []
    return line | {"commit": commits_of(rows)}


def share_of_dense(row: dict, found: dict[str, dict]) -> str:
    return f"{100 * row['parameters (M)'] / found['dense']['parameters (M)']:.0f} %"


def column_of(measurement: str, model: str, size: str) -> str:
    return f"{measurement}, {model}, {in_words(measurement, size)}"


def by_worth(line: dict) -> tuple:
    """By perplexity, unknown ones last; where there is none at all, the fastest first."""
    scores = [value for column, value in line.items() if column.startswith("perplexity")]
    speeds = [value for value in line.values() if isinstance(value, str) and value.endswith("x")]
    return [value is None for value in scores], [value or 0 for value in scores], [-float(s[:-1]) for s in speeds]


def size_and_speed(timed: Timed | None) -> list[str]:
    if timed is None:
        return []
    kept = f", {100 * timed.ratio:.0f} % of each projection kept" if timed.ratio else ""
    return [f"Parameters and speed over dense are those of {timed.model} as a whole{kept}."]


def perplexity(scores: list[dict], ratios: list[float]) -> list[str]:
    if not ratios:
        return []
    first = scores[0]
    method = f', method "{first["method"]}"' if first.get("method") else ""
    return [f"Perplexities are those of {first['model']} on {first['dataset']}{method}: lower is better."]


def facts(names: list[str], timed: Timed | None, scores: list[dict], ratios: list[float]) -> list[Fact]:
    """The best of each column."""
    found: list[Fact] = []
    sizes = timed.sizes if timed else {}
    model = timed.model if timed else ""
    for measurement, (size, rows) in sizes.items():
        here = {name: rows[name] for name in names if name in rows}
        if not here:
            continue
        if not found:
            name = min(here, key=lambda name: here[name]["parameters (M)"])
            said = f"{spoken(name)}, {model}"
            found.append(Fact(share_of_dense(here[name], rows), "of the parameters", said))
        name = max(here, key=lambda name: here[name]["speed over dense"])
        speed = f"{here[name]['speed over dense']:.2f}x"
        said = f"{spoken(name)}, {model}, {in_words(measurement, size)}"
        found.append(Fact(speed, f"as fast as dense, {measurement}", said))
    for ratio in ratios:
        rivals = [row for row in scores if row["ratio"] == ratio and variant_of(row) in names]
        if rivals:
            row = min(rivals, key=lambda row: row["ppl"])
            of = f"{label_of(row)}, {row['model']} on {row['dataset']}" + dense_said(row)
            found.append(Fact(f"{row['ppl']:.1f}", f"perplexity, {100 * ratio:.0f} % kept", of))
    return found


def dense_said(row: dict) -> str:
    return f"; dense {row['dense_ppl']:.1f}" if row.get("dense_ppl") else ""


def spoken(variant: str) -> str:
    return variant.replace(":", " ")
