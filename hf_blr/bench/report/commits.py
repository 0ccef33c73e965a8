"""Which commit a table is of: that of most of its lines; the lines of another name theirs."""

from __future__ import annotations

from collections import Counter

#: commits that a line names; of more, as where it sums up many rows, it says how many
MOST_NAMED = 4


def rows_of(result: dict) -> list[dict]:
    """The rows of a result file, each with the commit that it was measured at; the file's own where it names none."""
    default = result.get("environment", {}).get("commit", "")
    return [{**row, "commit": (row.get("commit") or default)[:7]} for row in result["rows"]]


def commits_of(rows: list[dict]) -> str:
    """Those of rows, or of lines, each once: `10581f1, ebab421`."""
    named = (commit for row in rows for commit in (row.get("commit") or "").split(", ") if commit)
    return ", ".join(dict.fromkeys(commit[:7] for commit in named))


def marked(lines: list[dict], rows: list[dict], columns: list[str] | None = None) -> tuple[str, list[str], list[dict]]:
    """The commit of a table, its columns and its lines; a column "other commit" where there is another.

    Args:
        lines: of the table, with their "commit".
        rows: that the lines are of. Where two commits are in as many lines, that of more rows is the table's.
        columns: all of the lines if left out.
    """
    commits = [line.get("commit", "").split(", ") for line in lines]
    in_rows = Counter(row["commit"] for row in rows)
    in_lines = Counter(commit for several in commits for commit in several)
    main = max(in_lines, key=lambda commit: (in_lines[commit], in_rows[commit]))
    others = [named([commit for commit in several if commit != main]) for several in commits]
    names = columns or list(dict.fromkeys(column for line in lines for column in line if column != "commit"))
    if any(others):
        names = [*names, "other commit"]
    shown = [{**line, "other commit": other} for line, other in zip(lines, others, strict=True)]
    return main, names, [{name: line.get(name) for name in names} for line in shown]


def named(commits: list[str]) -> str:
    return ", ".join(commits) if len(commits) <= MOST_NAMED else f"{len(commits)} others"
