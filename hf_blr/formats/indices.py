"""Indices that averages do not reach.

A moving average over all tensors of a model, buffers too, makes of an index i something between i - 1 and i + 1: sums
of products round, and what is copied into integers is cut off. Indices belong to the factors that were fitted with them
and have no average; such a one is taken for what it was made of.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from hf_blr.formats.values import fault
from hf_blr.structures import INDEX


class IndexGuard:
    """What the indices of one layer were when they were last right, and whether anybody has written to them since."""

    def __init__(self) -> None:
        #: {name: (a copy, the version of the tensor that was looked at)}
        self._right: dict[str, tuple[Tensor, int]] = {}

    def written(self, owner: nn.Module) -> bool:
        """Whether one, a buffer of `owner`, was written to; cheap, and blind to what goes through `.data`."""
        return any(version_of(getattr(owner, name)) != version for name, (_, version) in self._right.items())

    @torch.no_grad()
    def settle(self, indices: Mapping[str, Tensor]) -> None:
        """Puts averaged indices right, in place, and notes what the others have become.

        Args:
            indices: {name: integers}, under the same names each time.

        Raises:
            ValueError: if one that was right holds something else than a permutation or its own average.
        """
        for name, index in indices.items():
            if index.is_meta:
                continue
            before = self._right.get(name)
            if before is not None and before[0].device == index.device and torch.equal(before[0], index):
                self._right[name] = before[0], version_of(index)
            elif fault(INDEX, index) is None:
                self._right[name] = index.clone(), version_of(index)
            elif before is not None:
                if not is_average(index, before[0]):
                    raise ValueError(
                        f"{name}: expected each integer of 0 to {index.shape[-1] - 1} once, got others or some twice, "
                        "which were written into it in place; average the floating-point tensors of one model over "
                        "its steps, and copy integers"
                    )
                index.copy_(before[0])
                self._right[name] = before[0].to(index.device), version_of(index)


def version_of(index: Tensor) -> int:
    """A number that grows when the tensor is written to; tensors of inference mode count nothing."""
    return -1 if index.is_inference() else index._version


def is_average(value: Tensor, index: Tensor) -> bool:
    """Whether numbers can be a moving average of this index: none is more than one away."""
    if value.shape != index.shape or value.is_meta or index.is_meta:
        return False
    return bool(((value.double() - index.to(value.device).double()).abs() <= 1).all())
