"""How a layer's tensors are stored: the way from the factors of a structure to what a module keeps, and back.

A structure says what its tensors are (`BLRSpec.tensors`: shape and kind). A format says in what form those of the kind
"factor" are kept: under which names, in which shapes and dtypes. A format is a file beside this one and its entry in
`FORMATS`.
"""

from __future__ import annotations

from typing import Any

from hf_blr.formats.plain import PLAIN, Format

__all__ = ["FORMATS", "PLAIN", "Format", "format_named"]

FORMATS: dict[str, Format] = {PLAIN.name: PLAIN}


def format_named(name: Any) -> Format:
    """The format of that name. Raises ValueError that lists the names."""
    if not isinstance(name, str) or name not in FORMATS:
        raise ValueError(f"format must be one of {sorted(FORMATS)}, got {name!r}; a later hf_blr may know it")
    return FORMATS[name]
