"""One self-contained page: a summary, and for each question its plots and its tables, which sort at a click."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from hf_blr.bench.report.cells import is_numeric, sort_value
from hf_blr.bench.report.figures import Plot
from hf_blr.bench.report.plots import INK
from hf_blr.bench.report.sections import sections
from hf_blr.bench.report.summary import Summary
from hf_blr.bench.report.tables import Table
from hf_blr.markdown import format_cell

if TYPE_CHECKING:
    from markupsafe import Markup


def page(title: str, tables: list[Table], plots: list[Plot], notes: list[str], summary: Summary) -> str:
    """The page's HTML.

    Args:
        title: of the page.
        tables: in their order within a question.
        plots: likewise.
        notes: lines at the end, as plain text.
        summary: the first screen.
    """
    # slow to import, and only this needs it
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("hf_blr.bench.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"shown": format_cell, "key": sort_value, "in_theme": in_theme, "unbroken": unbroken}
    environment.globals["numeric"] = numeric
    return environment.get_template("page.html.j2").render(
        title=title, summary=summary, sections=sections(tables, plots), notes=notes
    )


def numeric(table: Table) -> set[str]:
    """The columns of numbers."""
    return {column for column in table.columns if all(is_numeric(row.get(column)) for row in table.rows)}


def unbroken(text: str) -> str:
    """With sizes and shares that stay on one line."""
    return re.sub(r"(?<=\d) (?=[x%])|(?<=x) (?=\d)|(?<=\d) (?=texts?$)", "\u00a0", text)


def in_theme(svg: str) -> Markup:
    """The plot with letters and axes in the colour of the text around it."""
    from markupsafe import Markup

    return Markup(svg.replace(INK, "currentColor"))
