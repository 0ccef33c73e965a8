"""The model and sizes that say most about a set of rows of `bench model`."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from hf_blr.bench.report.model_tables import MEASUREMENTS, by_size


@dataclass(frozen=True)
class Timed:
    """One model.

    Args:
        ratio: that all its rows but dense's are of; None where none is known.
        sizes: {measurement: (size, {variant: row of `by_size`})}, each at the size with most variants.
    """

    model: str
    ratio: float | None
    sizes: dict[str, tuple[str, dict[str, dict]]]

    @property
    def variants(self) -> dict[str, None]:
        return {name: None for _, rows in self.sizes.values() for name in rows}


def main_ratio(rows: list[dict]) -> float | None:
    """That of most rows; None where none says one."""
    ratios = Counter(row["ratio"] for row in rows if row.get("ratio") and row["variant"] != "dense")
    return ratios.most_common(1)[0][0] if ratios else None


def timed_of(rows: list[dict], ratio: float | None) -> Timed | None:
    """The model with most variants at this ratio; None where nothing was compared with dense.

    Rows that name no ratio are taken to be of this one.
    """
    rows = [row for row in rows if row.get("ratio", ratio) == ratio]
    models: dict[str, dict] = {}
    for measurement in MEASUREMENTS:
        for (model, size), found in by_size(rows, measurement).items():
            sizes = models.setdefault(model, {})
            if "dense" in found and len(found) > len(sizes.get(measurement, ("", ["dense"]))[1]):
                sizes[measurement] = size, found
    most = max(models, key=lambda name: sum(len(found) for _, found in models[name].values()), default=None)
    return Timed(most, ratio, models[most]) if most and models[most] else None
