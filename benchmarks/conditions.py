"""Where the result files are, and how a table says on what its numbers were measured."""

from __future__ import annotations

from pathlib import Path

from hf_blr.bench.report.commits import marked
from hf_blr.markdown import format_table

RESULTS = Path(__file__).parent / "results"


def table_of(lines: list[dict], rows: list[dict], result: dict, columns: list[str] | None = None) -> tuple[str, str]:
    """A table, whose lines of another commit than most say so, and on what it was measured, with its commit.

    Args:
        lines: as of `hf_blr.bench.report.lines.wide`.
        rows: that they are of, as of `hf_blr.bench.report.commits.rows_of`.
        result: their file.
        columns: all of the lines if left out.
    """
    commit, names, shown = marked(lines, rows, columns)
    return format_table(shown, names), machine(result["environment"] | {"commit": commit})


def machine(environment: dict) -> str:
    """Card, torch, commit and date."""
    commit = environment["commit"][:7]
    return f"{environment['device']}, torch {environment['torch']}, commit {commit}, {environment['date']}"
