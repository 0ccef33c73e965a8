"""The tables of a result file: which it has rows for, which question each answers, under which conditions."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from hf_blr.bench.report.commits import commits_of, marked, rows_of
from hf_blr.bench.report.conditions import card_of, kind_of, measured_peaks, protocol_of, where_of
from hf_blr.bench.report.layer_tables import group_lines, layer_lines, prediction_lines
from hf_blr.bench.report.lines import grouped, structure_of
from hf_blr.bench.report.model_tables import (
    compared,
    failed_lines,
    memory,
    profile_lines,
    speed_lines,
    storage_lines,
)
from hf_blr.bench.report.quality_tables import largest_first, quality_columns, quality_lines
from hf_blr.markdown import format_cell
from hf_blr.roofline.devices import Peaks

#: question, title, lines and, where there are any, what is said of them and columns, as `made` takes them
Parts = tuple[Any, ...]


@dataclass(frozen=True)
class Table:
    """Rows `{column: value}` under a title.

    Args:
        note: how to read it.
        columns: the rows' own if left out.
        question: the key of the one that it answers, see `sections.QUESTIONS`.
        card: that it was measured on.
        where: card, versions, commit and date.
        protocol: how it was measured.
    """

    title: str
    rows: list[dict]
    note: str = ""
    columns: list[str] = field(default_factory=list)
    question: str = "other"
    card: str = ""
    where: str = ""
    protocol: str = ""

    def __post_init__(self) -> None:
        if not self.columns:
            self.columns.extend(dict.fromkeys(column for row in self.rows for column in row))


def tables(name: str, result: dict) -> list[Table]:
    """The tables of one result file. `name` is that of the file."""
    make = {"layers": of_layers, "groups": of_groups, "models": of_models, "quality": of_quality}.get(
        kind_of(result) or "", of_others
    )
    rows = rows_of(result)
    return [made(result, rows, *parts) for parts in make(name, rows, measured_peaks(card_of(result))) if parts[2]]


def made(
    result: dict,
    rows: list[dict],
    question: str,
    title: str,
    lines: list[dict],
    said: str = "",
    columns: list[str] | None = None,
) -> Table:
    """The table of these lines, under the conditions of its commit."""
    main, names, shown = marked(lines, rows, columns)
    return Table(title, shown, said, names, question, card_of(result), where_of(result, main), protocol_of(result))


def of_layers(name: str, rows: list[dict], peaks: Peaks | None) -> Iterator[Parts]:
    for model, mine in grouped(rows, lambda row: row["model"]).items():
        title = f"Layers of {model}" if model else "Layers"
        yield "layers", title, layer_lines(mine), "Dense in microseconds, the others as speed over it."
    if peaks:
        # torch's meta device and the shapes of models are slow to import, and only some files need them
        from hf_blr.bench.peaks import predictions

        yield "predicted", "Layers: predicted and measured", prediction_lines(predictions(rows, peaks), [])


def of_groups(name: str, rows: list[dict], peaks: Peaks | None) -> Iterator[Parts]:
    said = "Speed over dense of projections that read one input, one by one -> together."
    yield "layers", "Projections with one input", group_lines(rows), said


def of_models(name: str, rows: list[dict], peaks: Peaks | None) -> Iterator[Parts]:
    good = [row for row in rows if "error" not in row]
    variants = dict.fromkeys(row["variant"].removesuffix("+fused") for row in good)
    titles = {variant: variant for variant in sorted(variants) if structure_of(variant) != "dense"}
    lines = [
        line | {"peak memory": memory(mine), "commit": commits_of(mine)} for line, mine in speed_lines(good, titles)
    ]
    said = "Speed over dense, each in its fastest form; * fused. Peak memory is that of dense."
    yield "models", "Speed of whole models", lines, said
    for measurement, title in (("prefill", "Prefill"), ("decode", "Decoding"), ("training", "Training step")):
        yield "models", f"{title} of whole models", compared(good, measurement)
    yield "size", "Models on disk", storage_lines(good), "Gigabytes and, in brackets, seconds to load."
    predict = None
    if peaks:
        from hf_blr.bench.model_peaks import model_predictions, predicted_parts

        yield (
            "predicted",
            "Whole models: predicted and measured",
            prediction_lines([], model_predictions(good, peaks)),
        )

        def predict(row: dict) -> dict[str, float]:
            return predicted_parts(row, peaks)

    said = "Milliseconds by PyTorch's profiler" + (" and, in brackets, as predicted." if peaks else ".")
    yield "time", "Where the time goes", profile_lines(good, predict), said
    yield "failed", "What failed", failed_lines(rows)


def of_quality(name: str, rows: list[dict], peaks: Peaks | None) -> Iterator[Parts]:
    lines = largest_first(quality_lines(rows))
    dense = {f"{row.get('dataset')} {row['dense_ppl']:.2f}": 0 for row in rows if row.get("dense_ppl")}
    said = f"Dense: {', '.join(dense)}." if dense else ""
    yield "size", "Perplexity", lines, said, quality_columns(rows, lines)


def of_others(name: str, rows: list[dict], peaks: Peaks | None) -> Iterator[Parts]:
    """Rows as they are, without what no cell can hold; what all rows share is said once."""
    lines = [{key: plain(value) for key, value in row.items() if not nested(value)} for row in rows]
    # rows of older commits lack what is nothing in the others
    columns = dict.fromkeys(
        key for line in lines for key, value in line.items() if key != "commit" and value is not None
    )
    shared = {key for key in columns if len({line.get(key) for line in lines}) == 1} if len(lines) > 1 else set()
    said = ", ".join(f"{key} {format_cell(lines[0][key])}" for key in columns if key in shared)
    varying = [key for key in columns if key not in shared] or list(columns)
    yield "other", name, lines, f"In all rows: {said}." if said else "", varying


def nested(value: object) -> bool:
    return isinstance(value, dict) or (
        isinstance(value, list) and any(isinstance(part, (dict, list)) for part in value)
    )


def plain(value: Any) -> Any:
    return " x ".join(map(str, value)) if isinstance(value, list) else value
