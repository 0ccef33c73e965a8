"""One self-contained page: tables that sort at a click, plots inline, readable on a phone."""

from __future__ import annotations

import html
import math

from hf_blr.bench.report.tables import Table

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 70rem; padding: 0 1rem 4rem; color: #1b1f24; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2.5rem; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: .9rem; }
th, td { padding: .25rem .6rem; border-bottom: 1px solid #d5dae0; white-space: nowrap; text-align: left; }
th { cursor: pointer; position: sticky; top: 0; background: #f2f4f7; } th[aria-sort] { background: #dbe6f5; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; }
.note { color: #57606a; font-size: .85rem; } figure { margin: 1rem 0; } svg { max-width: 100%; height: auto; }
@media (prefers-color-scheme: dark) {
  body { background: #14171b; color: #e4e7eb; } th { background: #22272e; } th[aria-sort] { background: #2b3a50; }
  th, td { border-color: #363c44; } .note { color: #9aa4af; } figure { background: #fff; border-radius: 6px; }
}
"""

# a column sorts by its cells' values, numbers before words and empty cells last; a second click turns it around
SCRIPT = """
for (const header of document.querySelectorAll("th")) {
  header.addEventListener("click", () => {
    const table = header.closest("table"), body = table.tBodies[0], column = header.cellIndex;
    const down = header.getAttribute("aria-sort") === "ascending";
    for (const other of table.querySelectorAll("th")) other.removeAttribute("aria-sort");
    header.setAttribute("aria-sort", down ? "descending" : "ascending");
    const value = row => row.cells[column].dataset.value ?? "";
    const compare = (a, b) => {
      const x = value(a), y = value(b);
      if (x === "" || y === "") return (x === "") - (y === "");
      const numbers = !isNaN(x) && !isNaN(y);
      return (numbers ? x - y : x.localeCompare(y)) * (down ? -1 : 1);
    };
    body.append(...[...body.rows].sort(compare));
  });
}
"""


def page(title: str, tables: list[Table], figures: list[tuple[str, str]], notes: list[str]) -> str:
    """The page's HTML.

    Args:
        title: of the page.
        tables: in their order.
        figures: (caption, SVG element).
        notes: lines under the title, as plain text.
    """
    parts = [f"<h1>{html.escape(title)}</h1>", *(f'<p class="note">{html.escape(note)}</p>' for note in notes)]
    parts += [f"<figure>{svg}<figcaption>{html.escape(text)}</figcaption></figure>" for text, svg in figures]
    parts += [table_html(table) for table in tables]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{STYLE}</style></head>\n<body>\n"
        + "\n".join(parts)
        + f"\n<script>{SCRIPT}</script>\n</body></html>\n"
    )


def table_html(table: Table) -> str:
    numeric = {c for c in table.columns if all(is_numeric(row.get(c)) for row in table.rows)}
    head = "".join(f'<th scope="col"{number_class(c in numeric)}>{html.escape(c)}</th>' for c in table.columns)
    lines = ["<tr>" + "".join(cell(row.get(c), c in numeric) for c in table.columns) + "</tr>" for row in table.rows]
    return (
        f"<h2>{html.escape(table.title)}</h2>\n"
        f'<div class="wide"><table><thead><tr>{head}</tr></thead>\n<tbody>\n' + "\n".join(lines) + "\n</tbody></table>"
        f'</div>\n<p class="note">{html.escape(table.note)}</p>'
    )


def cell(value, numeric: bool) -> str:
    """A cell that shows a rounded value and sorts by the whole one."""
    key = html.escape(str(sort_value(value)))
    return f'<td{number_class(numeric)} data-value="{key}">{html.escape(shown(value))}</td>'


def number_class(numeric: bool) -> str:
    return ' class="number"' if numeric else ""


def is_numeric(value) -> bool:
    return value is None or isinstance(sort_value(value), (int, float))


def sort_value(value):
    """1.5 for "1.50x"; an empty string for nothing, or for what is no number though it should be."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, str) and value.endswith("x"):
        try:
            return float(value[:-1])
        except ValueError:
            return value
    return value


def shown(value) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1 or abs(value) >= 1000 else f"{value:.2f}"
    return str(value)
