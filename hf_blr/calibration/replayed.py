"""Steps on tensors of one shape, started as one CUDA graph.

A step on a block is some hundred small kernels, and the host takes longer to start each than the GPU to run it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

#: calls before the capture, in which libraries choose their kernels and optimizers make their state
WARM_UP = 2


class Replayed:
    """A step on tensors of a GPU, whatever numbers they hold: two calls run as they are, the others replay a graph.

    What the step makes lives in memory of the graph, which ends with this object.

    Args:
        step: reads and writes the same tensors each time, besides its arguments.
        arguments: like those of each call.
    """

    def __init__(self, step: Callable[..., object], *arguments: Tensor):
        self.step, self.calls = step, 0
        self.arguments = [torch.empty_like(argument) for argument in arguments]
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, *arguments: Tensor) -> None:
        for own, argument in zip(self.arguments, arguments, strict=True):
            own.copy_(argument)
        if self.calls < WARM_UP:
            self.calls += 1
            self.step(*self.arguments)
            return
        if self.graph is None:
            self.graph = torch.cuda.CUDAGraph()
            # other threads may fit models of their own meanwhile
            with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
                self.step(*self.arguments)
        self.graph.replay()


class ReadsNumbers(TorchDispatchMode):
    """Notices in `found` whether ops inside hand numbers of a tensor to the host, or make shapes of them.

    A graph would hold on to those of its capture. Of this thread alone: a backward runs in others.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found = False

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        moves = func is torch.ops.aten._to_copy.default and out.device != args[0].device
        self.found |= moves or torch.Tag.data_dependent_output in func.tags
        if torch.Tag.dynamic_output_shape in func.tags:
            # an index of integers has a shape that is known
            integers = func is torch.ops.aten.index.Tensor and not any(map(is_mask, args[1]))
            self.found |= not integers
        return out


def is_mask(index: Tensor | None) -> bool:
    return index is not None and index.dtype in (torch.bool, torch.uint8)


def reads_numbers(function: Callable[[], object]) -> bool:
    """Whether one call of a function does as `ReadsNumbers` says."""
    with torch.no_grad(), ReadsNumbers() as mode:
        function()
    return mode.found
