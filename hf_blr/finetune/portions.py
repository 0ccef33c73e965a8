"""How much text a step reads, and some of the text."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from hf_blr.calibration.calls import Batch

#: tokens of a batch that is cut from windows
AT_ONCE = 32768


def step_size(windows: Tensor | Sequence[Batch], batch_size: int) -> tuple[int, int]:
    """(tokens of a step at most, steps of an epoch)."""
    if torch.is_tensor(windows):
        return batch_size * windows.shape[1], -(-len(windows) // batch_size)
    return max((tokens_in(batch) for batch in windows), default=0), len(windows)


def tokens_in(batch: Batch) -> int:
    return next(iter(batch.values())).numel()


def some_of(model: nn.Module, windows: Tensor | Sequence[Batch], tokens: int) -> list[Batch]:
    """Batches on the model's device, of so many tokens or a few more, if there are so many."""
    device = next(model.parameters()).device
    if torch.is_tensor(windows):
        count = max(1, tokens // windows.shape[1])
        windows = [{"input_ids": some} for some in windows[:count].split(max(1, AT_ONCE // windows.shape[1]))]
    found: list[Batch] = []
    for batch in windows:
        found.append({key: value.to(device) for key, value in batch.items()})
        if sum(map(tokens_in, found)) >= tokens:
            break
    return found
