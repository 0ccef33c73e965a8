"""The structures: what each stores, and a record of everything in which they differ.

All structures project each input block (`v`), mix, and expand each output block (`u`). They differ in the mix, and
"pivoted" in how it stores the projection; "dense" is the whole matrix, for formats of fewer bits. A structure is a
folder beside this file and its name in `BUILT_IN`; one that lives elsewhere is made known by `register`. The folder's
`__init__` has sizes and record, without torch; its other files are the structure's part in the rooms above, and are
reached through the record alone.
"""

from __future__ import annotations

from typing import Any

from hf_blr.structures import blast, dense, low_rank, monarch, pivoted
from hf_blr.structures.blast import Blast
from hf_blr.structures.dense import Dense
from hf_blr.structures.low_rank import LowRank
from hf_blr.structures.monarch import Monarch
from hf_blr.structures.pivoted import Pivoted
from hf_blr.structures.record import Structure
from hf_blr.structures.spec import (
    CODES,
    FACTOR,
    INDEX,
    SCALE,
    SHAPE,
    BLRSpec,
    StoredTensor,
    as_block_pair,
    block_pair_of,
    is_count,
)

__all__ = [
    "CODES",
    "FACTOR",
    "INDEX",
    "SCALE",
    "SHAPE",
    "BLRSpec",
    "Blast",
    "Dense",
    "LowRank",
    "Monarch",
    "Pivoted",
    "StoredTensor",
    "Structure",
    "as_block_pair",
    "block_pair_of",
    "is_count",
    "make_spec",
    "max_rank",
    "register",
    "spec_from_dict",
    "structure_named",
    "structures",
    "unregister",
    "whole_structures",
]

BUILT_IN = (low_rank.RECORD, pivoted.RECORD, monarch.RECORD, blast.RECORD, dense.RECORD)

_records: dict[str, Structure] = {record.name: record for record in BUILT_IN}


def register(record: Structure) -> None:
    """Make a structure known under its name.

    Raises:
        ValueError: if the name is taken by another record.
    """
    known = _records.setdefault(record.name, record)
    if known != record:
        raise ValueError(f"there is a structure {record.name!r} already; give yours another name")


def unregister(name: str) -> None:
    """Forget a structure that `register` made known. Raises ValueError for one of the package's own."""
    if any(record.name == name for record in BUILT_IN):
        raise ValueError(f"{name!r} belongs to the package and cannot be taken out")
    _records.pop(name, None)


def structures() -> dict[str, Structure]:
    """{name: record} of every structure that has a rank, in the order in which they became known."""
    return {name: record for name, record in _records.items() if not record.whole}


def whole_structures() -> dict[str, Structure]:
    """{name: record} of those that store the whole matrix, and that a format alone makes smaller."""
    return {name: record for name, record in _records.items() if record.whole}


def structure_named(name: Any) -> Structure:
    """The record of a structure. Raises ValueError that lists the names."""
    if not isinstance(name, str) or name not in _records:
        raise ValueError(f"structure must be one of {sorted(_records)}, got {name!r}")
    return _records[name]


def make_spec(
    structure: str,
    in_features: int,
    out_features: int,
    *,
    ratio: float | None = None,
    rank: int | None = None,
    num_blocks: int | tuple[int, int] | None = None,
) -> BLRSpec:
    """A spec from a rank, or from the largest rank whose parameters are at most `ratio` of the dense ones.

    A structure that stores the whole matrix takes neither.

    Raises:
        ValueError: if not exactly one of ratio and rank is given, the budget buys no rank at all, or the result
            would hold as many numbers as the dense matrix or more; if a structure that stores the whole matrix is given
            a ratio, a rank or blocks.
    """
    record = structure_named(structure)
    cls = record.spec
    if record.whole:
        if (ratio, rank, num_blocks) != (None, None, None):
            raise ValueError(
                f"{structure} keeps the whole matrix, got ratio={ratio}, rank={rank} and num_blocks={num_blocks}; "
                "leave them out"
            )
        return cls(in_features, out_features, min(in_features, out_features))
    blocks = as_block_pair(cls.default_blocks if num_blocks is None else num_blocks)
    if (ratio is None) == (rank is None):
        raise ValueError(f"give exactly one of ratio and rank, got ratio={ratio} and rank={rank}")
    dense = in_features * out_features
    if rank is None:
        # the small constant keeps 0.3 * 10 from becoming 2
        rank = cls.rank_within(int(ratio * dense + 1e-6), in_features, out_features, blocks)  # type: ignore[operator]
        if rank < 1:
            cost = cls.parameters_at(1, in_features, out_features, blocks)
            # blocks that do not divide are the likelier mistake, so let the spec complain about them first
            cls(in_features, out_features, 1, blocks)
            raise ValueError(
                f"ratio={ratio} of {out_features}x{in_features} buys no {structure} rank with {blocks[0]}x{blocks[1]} "
                f"blocks: rank 1 costs {cost} of {dense} parameters; use a ratio of at least {cost / dense:.3f}, "
                "fewer blocks, or leave this module dense"
            )
    spec = cls(in_features, out_features, rank, blocks)
    highest = max_rank(structure, in_features, out_features, blocks)
    if rank > highest:
        raise ValueError(
            f"{structure} of rank {rank} stores {spec.num_parameters} parameters where the dense "
            f"{out_features}x{in_features} matrix has {dense}: nothing is saved; use a rank of at most {highest}"
        )
    return spec


def max_rank(
    structure: str, in_features: int, out_features: int, num_blocks: int | tuple[int, int] | None = None
) -> int:
    """The largest rank that stores fewer numbers than the dense matrix; 0 if there is none."""
    cls = structure_named(structure).spec
    blocks = as_block_pair(cls.default_blocks if num_blocks is None else num_blocks)
    return cls.rank_within(in_features * out_features - 1, in_features, out_features, blocks)


def spec_from_dict(data: dict[str, Any]) -> BLRSpec:
    """The inverse of `BLRSpec.to_dict`. Raises ValueError for unknown or missing keys."""
    data = dict(data)
    cls = structure_named(data.pop("structure", None)).spec
    wanted = {"in_features", "out_features", "rank", "num_blocks"}
    if set(data) != wanted:
        raise ValueError(f"a {cls.structure} spec has the keys {sorted(wanted)}, got {sorted(data)}")
    return cls(**data)
