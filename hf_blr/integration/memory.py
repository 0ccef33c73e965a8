"""Freed memory back to the system, so that streaming a model through a small space stays small."""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Callable


def trim() -> None:
    """Return the free pages of the C heap, where the C library can.

    glibc keeps them, and factors that are allocated between two dense weights cut the gaps too small for the next
    weight: without this, a load that never holds two dense weights at once can still grow to the dense model's size.
    """
    function = trim_function()
    if function is not None:
        function(0)


@functools.cache
def trim_function() -> Callable[[int], int] | None:
    """glibc's `malloc_trim`; None elsewhere."""
    if sys.platform != "linux":
        return None
    return getattr(ctypes.CDLL(None), "malloc_trim", None)
