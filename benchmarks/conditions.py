"""Where the result files are, and how a table says on what its numbers were measured."""

from __future__ import annotations

from pathlib import Path

RESULTS = Path(__file__).parent / "results"


def commits_of(rows: list[dict], default: str = "") -> str:
    """Those that the rows were measured at, each once; `default` is that of rows that say nothing."""
    return ", ".join(dict.fromkeys(row.get("commit", default)[:7] for row in rows))


def columns_of(lines: list[dict]) -> list[str]:
    """Those of a table that names its commits below."""
    return [column for column in lines[0] if column != "commit"]


def machine(environment: dict, commits: str = "") -> str:
    """commits: where rows are of more than one."""
    commits = commits or environment["commit"][:7]
    return f"{environment['device']}, torch {environment['torch']}, commit {commits}, {environment['date']}"
