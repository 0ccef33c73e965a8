"""The settings of a `BLRConfig` as a table, from the fields themselves."""

from __future__ import annotations

from hf_blr.config import option_fields
from hf_blr.markdown import format_table


def config_section() -> str:
    """Name, default, meaning and command-line flag of every setting."""
    rows = [
        {
            "setting": f"`{field.name}`",
            "default": f"`{field.default!r}`",
            "flag": f"`{field.metadata['cli']['flag']}`" if "flag" in field.metadata["cli"] else "",
            "meaning": field.metadata["help"].replace("|", "\\|"),
        }
        for field in option_fields()
    ]
    return format_table(rows)
