"""From rows to the lines of tables: names of forms, groups, a column for each value of a field."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

from hf_blr.bench.report.commits import commits_of
from hf_blr.formats import PLAIN


def grouped(rows: Iterable[dict], key: Callable[[dict], object]) -> dict:
    """{key: rows}, in the order in which keys come."""
    groups: dict = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return groups


def wide(rows: list[dict], head: Callable[[dict], dict], cell: Callable[[dict], dict]) -> list[dict]:
    """One line for each different `head`, to which each of its rows adds its `cell`, columns and values.

    Where two rows have a value for the same column, the first stays.

    "commit" holds those that the line's rows were measured at.
    """
    lines = []
    for group in grouped(rows, lambda row: tuple(head(row).items())).values():
        line = head(group[0])
        for row in group:
            for column, value in cell(row).items():
                line.setdefault(column, value)
        lines.append(line | {"commit": commits_of(group)})
    return lines


def blocks_of(row: dict, times: str = " x ") -> str:
    """`4 x 16`; nothing of rows without blocks."""
    return times.join(map(str, row["blocks"])) if row.get("blocks") else ""


def storage_of(row: dict) -> str:
    """The format's name; rows that name none are of plain factors."""
    return str(row.get("format", PLAIN.name))


def label_of(row: dict) -> str:
    """The structure and `4x16`; no blocks where there is one; "" for rows without a structure."""
    blocks = "" if row.get("blocks") == [1, 1] else blocks_of(row, "x")
    return f"{row.get('structure') or ''} {blocks}".strip()


def variant_of(row: dict) -> str:
    """As `bench model` calls it, with a colon before the blocks."""
    return label_of(row).replace(" ", ":")


def structure_of(variant: str) -> str:
    """What stands before `:4x4` and `+fused`."""
    return re.split("[:+]", variant)[0]


def tokens_of(row: dict) -> str:
    """The column of a row of `bench layers`: `1024 tokens`, `4096 tokens, training`."""
    return f"{row['tokens']} tokens" + ("" if row.get("direction", "forward") == "forward" else ", training")
