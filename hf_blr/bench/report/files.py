"""Reading and writing result files: `{"environment": ..., ..., "rows": [...]}`, one row a line."""

from __future__ import annotations

import json
from collections.abc import Callable, Hashable
from pathlib import Path

from hf_blr.atomic import write_text_atomically


class ResultFile:
    """Rows that are on disk as soon as they are measured.

    Args:
        path: of the file; None keeps the rows in memory only.
        head: what stands beside the rows: protocol, environment.
        append: keep the rows that the file holds already.

    Raises:
        ValueError: if the rows to be kept were measured on another device.
    """

    def __init__(self, path: Path | None, head: dict, append: bool = False):
        self.path, self.head = path, head
        self.rows: list[dict] = []
        if append and path is not None and path.exists():
            before = read_result(path)
            old, new = before["environment"]["device"], head["environment"]["device"]
            if old != new:
                raise ValueError(f"{path} holds rows of {old}, this is {new}; write to another file")
            self.rows = before["rows"]

    def add(self, rows: list[dict]) -> None:
        self.rows += rows
        if self.path is not None:
            write_result(self.path, {**self.head, "rows": self.rows})


def write_result(path: Path, result: dict) -> None:
    """Writes the file in one step, so that a program stopped half-way leaves the version before."""
    write_text_atomically(path, one_row_a_line(result))


def one_row_a_line(result: dict) -> str:
    """JSON whose rows can be read and compared line by line."""
    head = [f" {json.dumps(key)}: {json.dumps(value)}," for key, value in result.items() if key != "rows"]
    rows = ",\n".join(f"  {json.dumps(row)}" for row in result["rows"])
    return "\n".join(["{", *head, ' "rows": [', rows, " ]", "}", ""])


def read_result(path: Path) -> dict:
    """A result file.

    Raises:
        ValueError: if the file is no JSON object with a list of rows.
    """
    try:
        result = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is no JSON: {error}") from None
    if not isinstance(result, dict) or not isinstance(result.get("rows"), list):
        raise ValueError(f'{path} is no result file: it needs a list "rows"')
    return result


def merged(results: list[dict], key: Callable[[dict], Hashable]) -> dict:
    """One result with the rows of all; of rows with the same key the first stays. The head is the first's.

    Raises:
        ValueError: if they were measured on different devices.
    """
    devices = sorted({result["environment"]["device"] for result in results})
    if len(devices) > 1:
        raise ValueError(f"the results are of {', '.join(devices)}; merge those of one device")
    rows: dict[Hashable, dict] = {}
    for result in results:
        for row in result["rows"]:
            rows.setdefault(key(row), row)
    return {**results[0], "rows": list(rows.values())}
