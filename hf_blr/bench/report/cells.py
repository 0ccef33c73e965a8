"""What a value of a table sorts by."""

from __future__ import annotations

import math
import re

#: `1.65x*`, `0.27 (0.4)`, `4 x 16` and `50 %` sort by their first number; `10581f1` and `2026-01-31` are words
LEADING_NUMBER = re.compile(r"(-?\d+(?:\.\d+)?)(?:x\*?|\*)?(?: .*)?")


def sort_value(value: object) -> float | int | str:
    """1.5 for "1.50x"; an empty string for nothing, or for what is no number though it should be."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, (int, float)):
        return value
    found = LEADING_NUMBER.fullmatch(str(value))
    return float(found[1]) if found else str(value)


def is_numeric(value: object) -> bool:
    return isinstance(sort_value(value), (int, float)) or sort_value(value) == ""
