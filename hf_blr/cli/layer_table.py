"""Layers of a plan as a table: one row for each kind of projection."""

from __future__ import annotations

import re

from hf_blr.structures import BLRSpec


def rows_by_kind(specs: dict[str, BLRSpec], matrices: dict[str, int] | None = None) -> list[dict]:
    """Rows of layers that share their name's ending (q_proj, ...), their sizes and their structure.

    matrices: how many each layer holds; None for one.
    """
    many = dict.fromkeys(specs, 1) if matrices is None else matrices
    return [
        {
            "layers": f"{len(group)} x {kind}",
            "in x out": f"{spec.in_features} x {spec.out_features}",
            "structure": spec.structure,
            "blocks": "{} x {}".format(*spec.num_blocks),
            "rank": span([specs[name].rank for name in group]),
            "kept": sum(specs[name].ratio for name in group) / len(group),
            "parameters (M)": sum(many[name] * specs[name].num_parameters for name in group) / 1e6,
        }
        for (kind, *_), group in by_kind(specs).items()
        for spec in [specs[group[0]]]
    ]


def by_kind(specs: dict[str, BLRSpec]) -> dict[tuple, list[str]]:
    """{(ending, sizes, structure, blocks): names}, in the order of the first of each."""
    groups: dict[tuple, list[str]] = {}
    for name, spec in specs.items():
        # experts of one tensor are of one kind
        key = (
            re.sub(r"\.\d+$", "", name).rpartition(".")[2],
            spec.in_features,
            spec.out_features,
            spec.structure,
            spec.num_blocks,
        )
        groups.setdefault(key, []).append(name)
    return groups


def span(values: list[int]) -> str:
    """`7`, or `3-12`."""
    low, high = min(values), max(values)
    return str(low) if low == high else f"{low}-{high}"
