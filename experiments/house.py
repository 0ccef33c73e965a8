"""How the house stands: counts of a checkout, beside those of an earlier one.

python experiments/house.py . ../before
"""

from __future__ import annotations

import argparse
import re
import statistics
import subprocess
import sys
from pathlib import Path

from hf_blr.markdown import format_table

NAMES = re.compile(r"low_rank|lowrank|pivoted|monarch|blast", re.IGNORECASE)
#: where a structure is at home: its own folder, its kernels, and the rules of their routes
HOMES = ("structures/", "ops/triton/", "ops/rules/")
#: prints the arrows between the top-level rooms that lie on a circle
CIRCLES = """
import grimp
graph = grimp.build_graph("hf_blr")
rooms = sorted({name.split(".")[1] for name in graph.modules if "." in name})
arrows = {room: set() for room in rooms}
for importer in graph.modules:
    for imported in graph.find_modules_directly_imported_by(importer):
        if "." in importer and "." in imported:
            a, b = importer.split(".")[1], imported.split(".")[1]
            # a structure's own files are its part in the rooms above
            if a != b and not (a == "structures" and importer.count(".") > 2):
                arrows[a].add(b)
def reached(room):
    seen, todo = set(), [room]
    while todo:
        for other in arrows[todo.pop()] - seen:
            seen.add(other)
            todo.append(other)
    return seen
print(sum(room in reached(other) for room in rooms for other in arrows[room]), sum(map(len, arrows.values())))
"""


def counts(root: Path) -> dict[str, object]:
    package = root / "hf_blr"
    files = {file.relative_to(package).as_posix(): file.read_text() for file in sorted(package.rglob("*.py"))}
    lines = [len(text.splitlines()) for text in files.values() if text]
    naming = [name for name, text in files.items() if NAMES.search(text)]
    deciding = [name for name, text in files.items() if NAMES.search(without_prose(text))]
    circular, arrows = run([sys.executable, "-c", CIRCLES], root).split()
    readme = (root / "README.md").read_text().splitlines()
    return {
        "files": len(files),
        "root entries": len([entry for entry in package.iterdir() if entry.name not in ("__pycache__", "py.typed")]),
        "files that name a structure": len(naming),
        "... in code, not in prose": len(deciding),
        "... outside of structures/, ops/triton/ and ops/rules/": len([n for n in deciding if not n.startswith(HOMES)]),
        "arrows between rooms": int(arrows),
        "arrows on a circle": int(circular),
        "README lines": len(readme),
        "longest file": max(lines),
        "median file": statistics.median(lines),
        "mypy errors": mypy_errors(root),
    }


def without_prose(text: str) -> str:
    """The code without comments and docstrings."""
    text = re.sub(r'"""(?:.|\n)*?"""', "", text)
    return re.sub(r"#.*", "", text)


def mypy_errors(root: Path) -> int:
    """By this checkout's own settings."""
    settings = Path(__file__).parents[1] / "pyproject.toml"
    found = run([sys.executable, "-m", "mypy", "--config-file", str(settings), "hf_blr"], root, check=False)
    summary = re.search(r"Found (\d+) errors", found)
    return int(summary[1]) if summary else 0


def run(command: list[str], root: Path, check: bool = True) -> str:
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=check)
    return done.stdout


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkouts", type=Path, nargs="+")
    args = parser.parse_args(argv)
    found = {root.resolve().name: counts(root.resolve()) for root in args.checkouts}
    names = list(next(iter(found.values())))
    print(format_table([{"": name, **{root: str(values[name]) for root, values in found.items()}} for name in names]))


if __name__ == "__main__":
    main()
