"""one page from result files: a summary, plots and tables by question, with machine, versions and commit

Writes report.html, which needs nothing beside it, and report.md. Result files are those of `hf-blr bench`, of
`hf-blr demo --json` and the like; plots need matplotlib, the extra `report`.

Example: hf-blr report benchmarks/results/*.json --out report
"""

from __future__ import annotations

import argparse
from pathlib import Path

from hf_blr.atomic import write_text_atomically
from hf_blr.bench.report.files import read_result
from hf_blr.bench.report.tables import Table, tables
from hf_blr.cli import saving
from hf_blr.markdown import format_table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("files", metavar="JSON", nargs="+", type=Path, help="result files")
    parser.add_argument("--out", type=Path, default=Path("report"), help="folder for the page")
    parser.add_argument("--title", default="hf_blr: measured", help="of the page")
    parser.add_argument("--no-plots", action="store_true", help="tables alone")


def run(args: argparse.Namespace) -> None:
    from hf_blr.bench.report.figures import figures
    from hf_blr.bench.report.page import page
    from hf_blr.bench.report.summary import summarised

    saving.check_folder(args.out, args.out)
    results = {path.stem: read_result(path) for path in args.files}
    found = [table for name, result in results.items() for table in tables(name, result)]
    summary = summarised(results)
    plots = {} if args.no_plots else figures(results)
    notes = [f"From {', '.join(path.name for path in args.files)}. A click on a column's name sorts by it."]
    write_text_atomically(args.out / "report.html", page(args.title, found, list(plots.values()), notes, summary))
    for name, plot in plots.items():
        write_text_atomically(args.out / f"{name}.svg", plot.svg)
        plot.figure.savefig(args.out / f"{name}.png", dpi=150)
    in_short = [summary.table] if summary.table else []
    write_text_atomically(args.out / "report.md", markdown(args.title, in_short + found, plots))
    print(f"{len(found)} tables and {len(plots)} plots in {args.out / 'report.html'}")


def markdown(title: str, found: list[Table], plots: dict) -> str:
    parts = [f"# {title}", *(f"![{plot.caption}]({name}.svg)" for name, plot in plots.items())]
    for table in found:
        said = " ".join(text for text in (table.note, table.protocol, table.where) if text)
        parts += [f"## {table.title}", format_table(table.rows, table.columns), said]
    return "\n\n".join(parts) + "\n"
