"""Layers of a plan as a table: one row for each kind of projection."""

from __future__ import annotations

import re

import torch

from hf_blr.plan.layers import Plan
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


def stored_rows(plan: Plan, dtype: torch.dtype) -> tuple[list[dict], str]:
    """Rows as of `rows_by_kind` with format and stored bits for each number of the dense matrix, and a summary.

    dtype: of the saved model, for what the plain format keeps.
    """
    specs = {name: layer.spec for name, layer in plan.items()}
    many = {name: layer.matrices for name, layer in plan.items()}
    rows = [
        {
            **row,
            "format": ", ".join(dict.fromkeys(plan[name].storage.name for name in group)),
            "bits a weight": bits_a_weight({name: plan[name] for name in group}, dtype),
        }
        for row, group in zip(rows_by_kind(specs, many), by_kind(specs).values(), strict=True)
    ]
    kept = sum(layer.matrices * layer.spec.num_parameters for layer in plan.values())
    dense, size = dense_numbers(plan), sum(layer.num_bytes(dtype) for layer in plan.values())
    return rows, (
        f"{len(plan)} layers hold {kept / 1e6:.1f} M of {dense / 1e6:.1f} M parameters ({100 * kept / dense:.1f} %), "
        f"{size / 1e6:.1f} MB, {bits_a_weight(plan, dtype):.2f} bits a weight"
    )


def bits_a_weight(plan: Plan, dtype: torch.dtype) -> float:
    """Stored for each number of the dense matrices of a plan's layers; dtype as in `stored_rows`."""
    return 8 * sum(layer.num_bytes(dtype) for layer in plan.values()) / dense_numbers(plan)


def dense_numbers(plan: Plan) -> int:
    """Numbers of the dense matrices of a plan's layers."""
    return sum(layer.matrices * layer.spec.dense_parameters for layer in plan.values())
