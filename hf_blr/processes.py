"""Processes that share one piece of work by torch.distributed; one that is alone has all of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class Processes:
    """This process among those that make the same calls in the same order.

    Attributes:
        count: how many there are. rank: this one's number.

    Args:
        joined: whether all of torch.distributed's default group work together; else this process is alone.

    Raises:
        ValueError: if they are to, and there is no such group.
    """

    def __init__(self, joined: bool = False):
        if joined and not (dist.is_available() and dist.is_initialized()):
            raise ValueError(
                "distributed=True needs a process group, and there is none: start one process per GPU with torchrun or "
                "accelerate launch, and make an accelerate.PartialState() first"
            )
        self.count = dist.get_world_size() if joined else 1
        self.rank = dist.get_rank() if joined else 0

    def share(self, size: int) -> slice:
        """This process' part of so many things in a row."""
        return slice(size * self.rank // self.count, size * (self.rank + 1) // self.count)

    def owners(self, costs: Sequence[float]) -> list[int]:
        """The process that does each thing, so that all take about as long."""
        loads, found = [0.0] * self.count, [0] * len(costs)
        for i in sorted(range(len(costs)), key=lambda i: -costs[i]):
            found[i] = loads.index(min(loads))
            loads[found[i]] += costs[i]
        return found

    def gathered(self, value: Any) -> list[Any]:
        """What each process says, in the order of their ranks: anything that can be pickled, on the CPU."""
        if self.count == 1:
            return [value]
        said = [None] * self.count
        dist.all_gather_object(said, value)
        return said

    def add(self, tensor: Tensor) -> None:
        """Makes of it the sum over all processes, in place."""
        if self.count > 1:
            self._in_place(tensor, dist.all_reduce)

    def whole(self, part: Tensor, size: int) -> Tensor:
        """The `size` rows of which each process holds its `share`."""
        if self.count == 1:
            return part
        rows = part.new_zeros(size, *part.shape[1:])
        rows[self.share(size)] = part
        self.add(rows)
        return rows

    def send(self, tensor: Tensor, owner: int) -> None:
        """Makes of it what the owner holds, in place; in bytes, since not every backend knows float8."""
        if self.count > 1:
            self._in_place(tensor, lambda part: dist.broadcast(part.view(-1).view(torch.uint8), owner))

    def _in_place(self, tensor: Tensor, act: Callable[[Tensor], Any]) -> None:
        tensor = tensor.detach()
        # NCCL takes contiguous tensors of a GPU
        moved = (tensor.cuda() if "nccl" in dist.get_backend() else tensor).contiguous()
        act(moved)
        if moved.data_ptr() != tensor.data_ptr():
            tensor.copy_(moved)


ALONE = Processes()
