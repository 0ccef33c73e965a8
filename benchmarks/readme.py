"""Writes the README's result table from the result files; `--check` only says whether it is current."""

import argparse
import json
import sys
from pathlib import Path

from hf_blr.cli.table import format_table

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "benchmarks" / "results" / "demo.json"
BEGIN, END = "<!-- demo:begin -->", "<!-- demo:end -->"


def section() -> str:
    """The Markdown between the markers."""
    result = json.loads(RESULT.read_text())
    machine = result["environment"]
    return "\n".join(
        [
            BEGIN,
            "",
            format_table(result["rows"]),
            "",
            f"{result['conditions']} `{result['command']}`, {result['seconds']:.0f} s in all on {machine['device']}; "
            f"torch {machine['torch']}, transformers {machine['transformers']}, Python {machine['python']}, commit "
            f"{machine['commit']}, {machine['date']}.",
            "",
            END,
        ]
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    readme = ROOT / "README.md"
    text = readme.read_text()
    before, rest = text.split(BEGIN)
    updated = before + section() + rest.split(END)[1]
    if args.check:
        return int(updated != text)
    readme.write_text(updated)
    return 0


if __name__ == "__main__":
    sys.exit(main())
