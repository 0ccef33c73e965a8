"""one page from result files: tables that sort, plots, machine, versions, commit

Writes report.html, which needs nothing beside it, and report.md. Result files are those of `hf-blr bench`, of
`hf-blr demo --json` and the like; plots need matplotlib, the extra `report`.

Example: hf-blr report benchmarks/results/*.json --out report
"""

from __future__ import annotations

from pathlib import Path

from hf_blr.bench.report.files import read_result
from hf_blr.bench.report.page import page
from hf_blr.bench.report.tables import Table, tables
from hf_blr.cli.table import format_table


def add_arguments(parser):
    parser.add_argument("files", metavar="JSON", nargs="+", type=Path, help="result files")
    parser.add_argument("--out", type=Path, default=Path("report"), help="folder for the page")
    parser.add_argument("--title", default="hf_blr: measured", help="of the page")
    parser.add_argument("--no-plots", action="store_true", help="tables alone")


def run(args):
    results = {path.stem: read_result(path) for path in args.files}
    found = [table for name, result in results.items() for table in tables(name, result)]
    plots = {} if args.no_plots else draw(results)
    args.out.mkdir(parents=True, exist_ok=True)
    notes = [f"From {', '.join(path.name for path in args.files)}. A click on a column's name sorts by it."]
    inline = [(caption, svg) for caption, svg, _ in plots.values()]
    (args.out / "report.html").write_text(page(args.title, found, inline, notes), encoding="utf-8")
    for name, (_, svg, figure) in plots.items():
        (args.out / f"{name}.svg").write_text(svg, encoding="utf-8")
        figure.savefig(args.out / f"{name}.png", dpi=150)
    (args.out / "report.md").write_text(markdown(args.title, found, plots), encoding="utf-8")
    print(f"{len(found)} tables and {len(plots)} plots in {args.out / 'report.html'}")


def draw(results: dict) -> dict[str, tuple[str, str, object]]:
    """{name: (caption, SVG, figure)}."""
    from hf_blr.bench.report.plots import as_svg, figures

    return {name: (caption, as_svg(figure), figure) for name, (caption, figure) in figures(results).items()}


def markdown(title: str, found: list[Table], plots: dict) -> str:
    parts = [f"# {title}", *(f"![{caption}]({name}.svg)" for name, (caption, *_) in plots.items())]
    for table in found:
        parts += [f"## {table.title}", format_table(table.rows, table.columns), table.note]
    return "\n\n".join(parts) + "\n"
