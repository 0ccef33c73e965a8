"""Windows from several sources, each with its share."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from hf_blr.config.texts import WRITTEN
from hf_blr.text.windows import sample_windows

logger = logging.getLogger(__name__)


def mixed_windows(
    shares: Mapping[str, float], num_samples: int, seed: int, windows_from: Callable[[str, int], Tensor]
) -> Tensor:
    """Windows `[n, seqlen]` of all sources, taking turns as their shares say.

    Where a text is too short for its share, all sources give less in proportion, and a warning says so.

    Args:
        shares: {source: positive weight}.
        num_samples: the most windows to return.
        seed: which windows are left out then.
        windows_from: (source, count) -> windows `[count or fewer, seqlen]`.

    Raises:
        ValueError: if a share comes to no window.
    """
    counts = window_counts(shares, num_samples)
    read = {name: windows_from(name, count) for name, count in counts.items() if name not in WRITTEN}
    total = num_samples
    while any(len(windows) < counts[name] for name, windows in read.items()):
        total -= 1
        counts = window_counts(shares, total)
    if total < num_samples:
        short = min(read, key=lambda name: len(read[name]) / shares[name])
        logger.warning(
            "%s has %d windows: to keep the shares, the mixture has %d of them instead of %d",
            short,
            len(read[short]),
            total,
            num_samples,
        )
    parts = {}
    for name, count in counts.items():
        # the model writes last, when all else was found
        windows = read[name] if name in read else windows_from(name, count)
        parts[name] = sample_windows(windows.flatten(), windows.shape[1], count, seed)
    return torch.cat(list(parts.values()))[turns(list(counts.values()))]


def window_counts(shares: Mapping[str, float], total: int) -> dict[str, int]:
    """{source: windows}, which add up to the total: rounded down, and what is left by the largest remainders."""
    weight = sum(shares.values())
    exact = {name: total * share / weight for name, share in shares.items()}
    counts = {name: int(number) for name, number in exact.items()}
    by_remainder = sorted(shares, key=lambda name: counts[name] - exact[name])
    for name in by_remainder[: total - sum(counts.values())]:
        counts[name] += 1
    for name, count in counts.items():
        if not count:
            raise ValueError(
                f"the share of {name!r}, {shares[name] / weight:.3g}, comes to none of {total} windows: ask for more "
                "windows, give it more, or leave it out"
            )
    return counts


def turns(counts: list[int]) -> Tensor:
    """The order in which parts that lie one after the other take turns, each spread evenly over the whole."""
    places = torch.cat([(torch.arange(count, dtype=torch.float64) + 0.5) / count for count in counts])
    return places.argsort(stable=True)
