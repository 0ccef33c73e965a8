"""What a compression cost on text that no fit saw."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_blr.calibration.calls import Batch, run
from hf_blr.calibration.padding import predicted_positions
from hf_blr.calibration.store import Store
from hf_blr.modes import evaluating

#: of the dense model's predictions are kept at most, and of tokens scored
MOST_BYTES, MOST_TOKENS = 1 << 30, 8192


class HeldOut:
    """The dense model's predictions on batches, to compare the compressed model's with.

    They are kept in float16 on the CPU, which rounds a divergence by less than 0.001.

    Args:
        model: still dense.
        batches: keyword arguments of the model's forward, on its device; the first of them that hold at most 8192
            tokens, or predictions of a GiB.
        store: where the predictions are kept, for as long as it is open.
    """

    def __init__(self, model: nn.Module, batches: list[Batch], store: Store | None = None):
        self.batches: list[Batch] = []
        self.predictions = (store or Store()).list()
        self.tokens = 0
        for batch in batches:
            found = log_probabilities(model, batch)
            if found is None or self.tokens + len(found) > min(MOST_TOKENS, MOST_BYTES // (2 * found.shape[-1])):
                break
            self.batches.append(batch)
            self.predictions.append(found.half().cpu())
            self.tokens += len(found)

    def divergence(self, model: nn.Module) -> float | None:
        """Mean KL(dense || model) in nats a prediction; None where there is nothing to compare."""
        total = 0.0
        for batch, kept in zip(self.batches, self.predictions, strict=True):
            found = log_probabilities(model, batch)
            assert found is not None
            dense = kept.to(found.device).float()
            total += F.kl_div(found, dense, reduction="sum", log_target=True).item()
        return total / self.tokens if self.tokens else None


@torch.no_grad()
def log_probabilities(model: nn.Module, batch: Batch) -> Tensor | None:
    """`[predictions that count, classes]`, float32; None of a model without classes to predict."""
    with evaluating(model):
        logits: Any = getattr(run(model, batch), "logits", None)
    if logits is None or logits.shape[-1] < 2:
        return None
    mask = predicted_positions(batch, model)
    if mask is not None and mask.shape == logits.shape[:-1]:
        logits = logits[mask.bool()]
    return logits.reshape(-1, logits.shape[-1]).float().log_softmax(-1)
