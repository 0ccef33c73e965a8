"""How a layer's tensors are stored: the way from the factors of a structure to what a module keeps, and back.

A structure says what its tensors are (`BLRSpec.tensors`: shape and kind). A format says in what form those of the kind
"factor" are kept: under which names, in which shapes and dtypes. A format is an entry in `FORMATS`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from hf_blr.formats.bits import Bits
from hf_blr.formats.codes import Codes
from hf_blr.formats.float8 import Float8
from hf_blr.formats.holder import FactorInBits
from hf_blr.formats.integers import Integer
from hf_blr.formats.plain import PLAIN, Factors, Format
from hf_blr.formats.training import FactorInTraining
from hf_blr.structures.spec import is_count

__all__ = [
    "FORMATS",
    "PLAIN",
    "Bits",
    "Codes",
    "FactorInBits",
    "FactorInTraining",
    "Factors",
    "Format",
    "format_named",
    "takes_groups",
]

FORMATS: dict[str, Format] = {
    storage.name: storage
    for storage in (
        PLAIN,
        Integer("int8", 8),
        Integer("int4", 4),
        Integer("int3", 3),
        Integer("int2", 2),
        Float8("fp8", 8),
    )
}


def format_named(name: Any, group_size: Any = None) -> Format:
    """The format of that name, with scales for groups of this size (None: for whole rows).

    Raises:
        ValueError: for an unknown name, with the known ones; for a group size that is no positive integer, or of a
            format that has no groups.
    """
    if not isinstance(name, str) or name not in FORMATS:
        raise ValueError(f"format must be one of {sorted(FORMATS)}, got {name!r}; a later hf_blr may know it")
    storage = FORMATS[name]
    if group_size is None:
        return storage
    if not isinstance(storage, Integer):
        raise ValueError(f"the format {name!r} takes no group_size, got {group_size!r}; leave it out")
    if not is_count(group_size) or group_size < 1:
        raise ValueError(f"group_size must be a positive integer or None, got {group_size!r}")
    return replace(storage, group_size=group_size)


def takes_groups(name: str) -> bool:
    """Whether the format of that name has scales for groups of a row."""
    return isinstance(FORMATS[name], Integer)
