"""Codes that somebody has averaged are refused.

A moving average over all tensors of a model makes of packed codes integers that are cut off, which stand for other
numbers altogether. A copy to put back would be as large as the layer; a sum says enough to refuse.
"""

from __future__ import annotations

import weakref

import torch
from torch import Tensor, nn

from hf_blr.formats.indices import version_of


class CodeGuard:
    """What the codes of one factor add up to, and whether they have been written to since."""

    def __init__(self) -> None:
        self._sum: int | None = None
        self._codes: weakref.ref[Tensor] | None = None
        self._version = 0

    def of_copy(self) -> CodeGuard:
        """The guard of a copy of these codes, in a tensor of its own."""
        found = CodeGuard()
        found._sum = self._sum
        return found

    def look(self, codes: Tensor, new: bool) -> None:
        """Notes what codes are there, or compares them with what was noted, if they were written to.

        Args:
            new: a tensor that was not noted yet, nor copied from such a one, is taken as it is; else it is let be.

        Raises:
            ValueError: if they are others.
        """
        # offloaded, sharded and traced tensors come and go
        if type(codes) is not nn.Parameter or codes.is_meta:
            return
        known = None if self._codes is None else self._codes()
        if known is codes and self._version == version_of(codes):
            return
        copied = self._codes is None and self._sum is not None
        if known is codes or copied:
            if sum_of(codes) != self._sum:
                raise ValueError(
                    "codes were written into in place, as by a moving average over all parameters; average the "
                    "floating-point tensors of a model whose factors train (BLRCallback), or before they are rounded"
                )
        elif new:
            self._sum = sum_of(codes)
        else:
            return
        self._codes, self._version = weakref.ref(codes), version_of(codes)

    def forget(self) -> None:
        """What comes next is written on purpose."""
        self._sum = self._codes = None


@torch.no_grad()
def sum_of(codes: Tensor) -> int:
    integers = codes.view(torch.uint8) if codes.is_floating_point() else codes
    return int(integers.sum(dtype=torch.int64))
