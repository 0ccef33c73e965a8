"""How a text is cut into windows, and which tokens each window scores."""

from __future__ import annotations

from itertools import groupby
from typing import NamedTuple


class Window(NamedTuple):
    """Positions in the text: the model reads `begin ... end - 1` and `first ... end - 1` are scored."""

    begin: int
    end: int
    first: int

    @property
    def length(self) -> int:
        return self.end - self.begin


def cut_windows(length: int, seqlen: int, stride: int) -> list[Window]:
    """The windows over a text of `length` tokens; see `perplexity` for what a stride does.

    Raises:
        ValueError: if the text is too short for one window.
    """
    if length < (seqlen if stride == seqlen else 2):
        remedy = f"use a seqlen of at most {length}, or more text" if length >= 2 else "at least 2 are needed"
        raise ValueError(f"the text has {length} tokens, too few for one window of seqlen={seqlen}; {remedy}")
    if stride == seqlen:
        return [Window(begin, begin + seqlen, begin + 1) for begin in range(0, length - seqlen + 1, seqlen)]
    windows = [Window(0, min(seqlen, length), 1)]
    while windows[-1].end < length:
        begin = windows[-1].begin + stride
        windows.append(Window(begin, min(begin + seqlen, length), windows[-1].end))
    return windows


def batch_windows(windows: list[Window], batch_size: int) -> list[list[Window]]:
    """At most `batch_size` windows of one length each, in order; only the last window can be shorter."""
    groups = [list(group) for _, group in groupby(windows, key=lambda window: window.length)]
    return [group[i : i + batch_size] for group in groups for i in range(0, len(group), batch_size)]
