"""Tables of whole models: each form against dense's fastest, time by part, files on disk, what failed."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from hf_blr.bench.report.commits import commits_of
from hf_blr.bench.report.lines import grouped, wide

MEASUREMENTS = ("prefill", "decode", "training")


def compared(rows: list[dict], measurement: str) -> list[dict]:
    """One row for each model, batch, number of tokens and variant: the fastest form, against dense's fastest."""
    good = [row for row in rows if row["measurement"] == measurement and "error" not in row]
    best = {key: min(group, key=lambda row: row["ms"]) for key, group in grouped(good, place_of).items()}
    return [compared_row(row, best.get((*key[:-1], "dense"))) for key, row in sorted(best.items(), key=by_speed)]


def place_of(row: dict) -> tuple:
    # a step that keeps fewer activations is another measurement, not another form
    return row["model"], row["batch"], row["tokens"], row.get("activation_budget", 1.0), row["variant"]


def by_speed(entry: tuple[tuple, dict]) -> tuple:
    (*place, variant), _ = entry
    return *place, variant != "dense", variant


def compared_row(row: dict, dense: dict | None) -> dict:
    line = {"model": row["model"], "variant": row["variant"], "batch": row["batch"]}
    if row["measurement"] != "decode":
        line["tokens"] = row["tokens"]
    line["form"] = f"{row['form']}, {row['mode']}" if "mode" in row else row["form"]
    if "activation_budget" in row:
        line["form"] += f", keeps {100 * row['activation_budget']:.0f} % of activations"
    line["ms"] = row["ms"]
    if row["measurement"] == "decode":
        line["tokens/s"] = row["tokens_per_second"]
    line["speed over dense"] = None if dense is None else dense["ms"] / row["ms"]
    line["parameters (M)"] = row["parameters"] / 1e6
    if row.get("peak_bytes"):
        line["peak GB"] = row["peak_bytes"] / 1e9
        # of some rows of one process it is known of the first alone
        known = dense.get("peak_bytes") if dense else None
        line["peak / dense"] = row["peak_bytes"] / known if known else None
    # a speed is of two rows, and so may be of two commits
    return line | {"commit": commits_of([row, *([dense] if dense else [])])}


def by_size(rows: list[dict], measurement: str) -> dict[tuple[str, str], dict[str, dict]]:
    """{(model, size in words): {variant: row of `compared`}}; with `+fused` or without, whichever is faster.

    The names have no `+fused`; a row's own variant says which it is.
    """
    found: dict[tuple[str, str], dict[str, dict]] = {}
    for row in compared(rows, measurement):
        group, name = found.setdefault((row["model"], size_of(row)), {}), row["variant"].removesuffix("+fused")
        if name not in group or row["ms"] < group[name]["ms"]:
            group[name] = row
    return found


def size_of(row: dict) -> str:
    """`8 x 1024` of a row of `compared`, batch and tokens, and what it keeps of the activations where that is said."""
    kept = row["form"].partition(", keeps ")[2]
    return f"{row['batch']} x {row.get('tokens', 1)}" + f", {kept} kept" * bool(kept)


def in_words(measurement: str, size: str) -> str:
    """A size as plots and sentences have it: `8 texts` of a decoding step."""
    if measurement != "decode":
        return size
    count = size.partition(" ")[0]
    return f"{count} text" + "s" * (count != "1")


def speed_lines(
    rows: list[dict], titles: dict[str, str], cell: Callable[[dict], str] | None = None
) -> Iterator[tuple[dict, list[dict]]]:
    """One line for each measurement, model and size with a dense row and a variant, and the variants' rows of it.

    Args:
        rows: of whole models.
        titles: {variant: name of its column}; others have none.
        cell: what is said of a row of `by_size`; its speed over dense if left out.
    """
    for measurement in MEASUREMENTS:
        for (model, size), found in by_size(rows, measurement).items():
            shown = {title: found[variant] for variant, title in titles.items() if variant in found}
            if "dense" in found and shown:
                line = {"": measurement, "model": model, "batch x tokens": size}
                line["dense, ms"] = f"{found['dense']['ms']:.2f}"
                cells = {title: (cell or speed)(row) for title, row in shown.items()}
                yield line | {title: cells.get(title, "") for title in titles.values()}, list(shown.values())


def speed(row: dict) -> str:
    """Over dense, with a mark where it is fused."""
    return f"{row['speed over dense']:.2f}x" + "*" * row["variant"].endswith("+fused")


def memory(rows: list[dict]) -> str:
    """The range of these rows' peak over dense's."""
    shares = [row["peak / dense"] for row in rows if row.get("peak / dense")]
    return f"{min(shares):.2f} to {max(shares):.2f}" if shares else ""


def storage_lines(rows: list[dict], titles: dict[str, str] | None = None) -> list[dict]:
    """One line for each model: gigabytes on disk and, in brackets, seconds to load, a column for each variant."""
    return wide(
        sorted((row for row in rows if row["measurement"] == "storage"), key=lambda row: row["model"]),
        lambda row: {"GB on disk (s to load)": row["model"]},
        lambda row: {
            (titles or {}).get(row["variant"], row["variant"]): f"{row['disk_bytes'] / 1e9:.3f} ({row['load_s']:.1f})"
        },
    )


def profile_lines(rows: list[dict], predict: Callable[[dict], dict[str, float]] | None = None) -> list[dict]:
    """Where a graph's milliseconds go, by the profiler and, in brackets, as predicted, of the rows with a profile.

    Args:
        rows: of whole models.
        predict: {part: milliseconds} of a row, as `model_peaks.predicted_parts`; without it no brackets.
    """
    lines = []
    for row in sorted((row for row in rows if "profile" in row), key=place_in_profiles):
        parts, predicted = row["profile"]["parts"], predict(row) if predict else {}
        measured = {"projections": parts["products"] + parts["blr"]}
        measured |= {name: parts[name] for name in ("attention", "elementwise")}
        line = {"ms": f"{row['model']}, {row['batch']} x {row['tokens']}", "": row["variant"]}
        line["mode"] = row.get("mode", "")
        line |= {part: with_brackets(ms, predicted.get(part)) for part, ms in measured.items()}
        line |= {"between": f"{parts['idle']:.2f}"}
        line |= {"in all": with_brackets(row.get("graph_ms", row["ms"]), sum(predicted.values()) or None)}
        lines.append(line | {"commit": commits_of([row])})
    return lines


def place_in_profiles(row: dict) -> tuple:
    return row["model"], row["batch"] * row["tokens"], row.get("mode", ""), row["variant"] != "dense", row["variant"]


def with_brackets(measured: float, predicted: float | None) -> str:
    return f"{measured:.2f}" + ("" if predicted is None else f" ({predicted:.2f})")


def failed_lines(rows: list[dict]) -> list[dict]:
    names = ("model", "variant", "measurement", "batch", "tokens", "form", "error")
    failed = [row for row in rows if "error" in row]
    return [{name: row.get(name) for name in names} | {"commit": commits_of([row])} for row in failed]
