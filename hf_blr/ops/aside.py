"""Kernels that run beside others of the same device: small ones fill the multiprocessors that a product leaves idle."""

from __future__ import annotations

import functools
from typing import Any

import torch


class Aside:
    """Within this context a device's kernels are launched beside those that follow it, until `join`.

    They wait for all that was launched before, and what is made of them may be read after `join`, which has to come
    before anything that they read is given up. On a CPU, or switched off, they are ordinary ones.

    Args:
        device: of the kernels.
        on: whether they run beside others at all.
    """

    def __init__(self, device: torch.device, on: bool):
        self.stream = second_stream(device) if on and device.type == "cuda" else None
        self.done: Any = None

    def __enter__(self) -> None:
        if self.stream is not None:
            self.stream.wait_stream(torch.cuda.current_stream(self.stream.device))
            self.switched = torch.cuda.stream(self.stream)
            self.switched.__enter__()

    def __exit__(self, *raised: Any) -> None:
        if self.stream is not None:
            self.switched.__exit__(*raised)
            self.done = self.stream.record_event()

    def join(self) -> None:
        """What is launched from here on waits for what was launched aside."""
        if self.stream is not None:
            torch.cuda.current_stream(self.stream.device).wait_event(self.done)


@functools.cache
def second_stream(device: torch.device) -> Any:
    # memory of its tensors comes back to this stream, whose next kernels wait for all that may still read it
    return torch.cuda.Stream(device)
