"""Kernels that compile side by side before anything runs on them."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager

#: compiling is C++ and other processes for the most part; more threads wait for Python
THREADS = 16


def side_by_side() -> AbstractContextManager[None] | None:
    """A context in which what is launched compiles and does not run; None where Triton, before 3.5, cannot do that.

    Nobody has to: what is launched without it compiles what it needs, one kernel after the other.
    """
    try:
        from hf_blr.ops.triton.side_by_side import compiling
    except ImportError:
        return None
    return compiling(min(THREADS, os.cpu_count() or 1))
