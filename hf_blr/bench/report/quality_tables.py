"""Tables of perplexities. A file may leave out what it does not know.

Rows that name no format are of plain factors.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from hf_blr.bench.report.lines import blocks_of, storage_of, wide
from hf_blr.formats import PLAIN


def quality_lines(rows: list[dict]) -> list[dict]:
    """One line for each model, size, structure, format, method, calibration set and seed; a column for each text."""
    lines = wide(
        rows,
        lambda row: {
            "model": row.get("model"),
            # a budget of bits names no ratio
            "ratio": row["kept"] if row.get("bits_per_weight") else row.get("ratio"),
            "structure": row.get("structure"),
            "blocks": blocks_of(row),
            "stored in": stored_in(row) if in_bits(row) else "",
            "method": row.get("method"),
            "calibration": row.get("calibration"),
            "seed": row.get("seed"),
        },
        lambda row: {
            "bits": row["bits"] if in_bits(row) else None,
            "MB": None if row.get("bytes") is None else row["bytes"] / 1e6,
            f"{row.get('dataset')} ppl": row["ppl"],
            "seconds": row.get("fit_seconds"),
        },
    )
    for line in lines:
        line["kept"] = None if line["ratio"] is None else f"{100 * line['ratio']:.0f} %"
    return lines


def largest_first(lines: list[dict]) -> list[dict]:
    """Those of `quality_lines` in the order of a long table."""
    return sorted(lines, key=lambda line: (-(line["ratio"] or 0), str([line[key] for key in HEAD[2:]])))


HEAD = ("model", "kept", "structure", "blocks", "stored in", "method", "calibration", "seed")


def quality_columns(rows: list[dict], lines: list[dict]) -> list[str]:
    """Those of `quality_lines` in which there is something: of the model only where there are several."""
    # the texts of all rows: a run that was stopped may not have scored each
    texts = dict.fromkeys(f"{row.get('dataset')} ppl" for row in rows)
    names = (*HEAD, "bits", "MB", *texts, "seconds")
    used = [name for name in names if any(line.get(name) not in (None, "") for line in lines)]
    return used if len({line["model"] for line in lines}) > 1 else [name for name in used if name != "model"]


def score(ppl: float) -> str:
    """A perplexity as people compare it: two places, none from 100 on, a power of ten from 1e5 on."""
    return f"{ppl:.0e}" if ppl >= 1e5 else f"{ppl:.{2 if ppl < 100 else 0}f}"


#: what a plan took is said of so many structures and formats
MOST_TAKEN = 3
#: perplexities above this many times dense's are not shown: they would press all others into one line
HIGHEST = 30


def in_bits(row: dict) -> bool:
    return storage_of(row) != PLAIN.name


def stored_in(row: dict) -> str:
    """`int4, groups of 64`; of a plan that chose formats, how many layers took what most took."""
    if row.get("taken"):
        first, rest = list(row["taken"].items())[:MOST_TAKEN], list(row["taken"].values())[MOST_TAKEN:]
        return ", ".join([f"{count} {name}" for name, count in first] + [f"{sum(rest)} others"] * bool(rest))
    groups = f", groups of {row['group_size']}" if row.get("group_size") else ""
    return f"{storage_of(row)}{groups}"


def plain(rows: Iterable[dict]) -> list[dict]:
    return [row for row in rows if not in_bits(row)]


def usable(rows: Iterable[dict]) -> list[dict]:
    """Those with a perplexity that is worth a look, and a size; of several calibration sets and seeds the first's."""
    rows = [row for row in rows if row.get("ppl") and row.get("bytes")]
    first = next((row for row in rows if row.get("calibration")), rows[0] if rows else {})
    rows = [row for row in rows if all(row.get(of) in (None, first.get(of)) for of in ("calibration", "seed"))]
    return [row for row in rows if row["ppl"] <= HIGHEST * (row.get("dense_ppl") or float("inf"))]


def main_method(rows: list[dict]) -> str | None:
    """That of most rows."""
    counted = Counter(row.get("method") for row in rows if row.get("structure"))
    return counted.most_common(1)[0][0] if counted else None


def scored(rows: Iterable[dict]) -> list[dict]:
    """The usable plain rows of the first model and text that are of the method of most rows."""
    rows = usable(plain(rows))
    method = main_method(rows)
    rows = [row for row in rows if row.get("structure") and row.get("method") == method]
    return [row for row in rows if all(row.get(of) == rows[0].get(of) for of in ("model", "dataset"))]
