"""Windows of tokens, or whole batches, as the `Trainer` takes them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.utils.data import Dataset

from hf_blr.calibration.calls import Batch


class WindowDataset(Dataset[dict[str, torch.Tensor]]):
    """`{"input_ids", "labels"}` per window, for a causal language model; needs no `datasets` and no collator.

    Labels equal the inputs: the model shifts them.

    Args:
        tokens: ids `[n, seqlen]`, as `hf_blr.text.sample_windows` returns them.

    Raises:
        ValueError: for any other shape, or numbers that are not integers.
    """

    def __init__(self, tokens: torch.Tensor):
        if not isinstance(tokens, torch.Tensor) or tokens.dim() != 2 or tokens.is_floating_point():
            is_tensor = isinstance(tokens, torch.Tensor)
            found = f"{tokens.dtype} of {list(tokens.shape)}" if is_tensor else type(tokens).__name__
            raise ValueError(f"tokens must be one tensor of integers, of shape [windows, seqlen], got {found}")
        self.tokens = tokens.long()

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.tokens[index], "labels": self.tokens[index]}


class BatchDataset(Dataset[Batch]):
    """Batches that are ready, one for each step; for a batch size of one and `BatchDataset.only` as the collator.

    Args:
        batches: keyword arguments of the model's forward, with labels where it has a loss of its own.

    Raises:
        ValueError: if there is none.
    """

    def __init__(self, batches: Sequence[Batch]):
        if not batches:
            raise ValueError("there is no batch to train on; give at least one, such as a tokenizer makes")
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> Batch:
        return self.batches[index]

    @staticmethod
    def only(batches: list[Batch]) -> Batch:
        (batch,) = batches
        return batch
