"""Windows of tokens as the `Trainer` takes them."""

from __future__ import annotations

import torch
from torch.utils.data import Dataset


class WindowDataset(Dataset[dict[str, torch.Tensor]]):
    """`{"input_ids", "labels"}` per window, for a causal language model; needs no `datasets` and no collator.

    Labels equal the inputs: the model shifts them.

    Args:
        tokens: ids `[n, seqlen]`, as `hf_blr.text.sample_windows` returns them.

    Raises:
        ValueError: for any other shape, or numbers that are not integers.
    """

    def __init__(self, tokens: torch.Tensor):
        if tokens.dim() != 2 or tokens.is_floating_point():
            raise ValueError(
                f"tokens must be integers of shape [windows, seqlen], got {tokens.dtype} of {list(tokens.shape)}"
            )
        self.tokens = tokens.long()

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.tokens[index], "labels": self.tokens[index]}
