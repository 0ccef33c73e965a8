"""The learning rate of a training, chosen by what it gives on windows that nothing is fitted to or trained on."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

from torch import Tensor, nn

from hf_blr.calibration.held_out import log_probabilities


class Judge:
    """How far models are from the dense one, and how well they predict, on held-out windows.

    Args:
        dense: the model to come close to.
        windows: token ids `[n, seqlen]`.
    """

    def __init__(self, dense: nn.Module, windows: Tensor):
        self.dense, self.windows = dense, windows.to(next(dense.parameters()).device)

    def divergence(self, model: nn.Module) -> float:
        """Mean KL(dense || model) in nats a token."""
        return self.mean(lambda window, found: (p := predicted(self.dense, window)).exp() * (p - found), model)

    def loss(self, model: nn.Module) -> float:
        """Mean cross-entropy in nats a token."""
        return self.mean(lambda window, found: -found[:-1].gather(1, window[1:, None]), model)

    def mean(self, each: Callable[[Tensor, Tensor], Tensor], model: nn.Module) -> float:
        """Over tokens, of sums over the classes; infinite of a ruined model, whose own is no number."""
        found = [each(window, predicted(model, window)).sum(-1).mean().item() for window in self.windows]
        return math.inf if any(map(math.isnan, found)) else sum(found) / len(found)


def predicted(model: nn.Module, window: Tensor) -> Tensor:
    """`[T, classes]`."""
    found = log_probabilities(model, {"input_ids": window[None]})
    assert found is not None
    return found


def best_rate(
    model: nn.Module,
    rates: list[float],
    train: Callable[[nn.Module, float], object],
    score: Callable[[nn.Module], float],
) -> tuple[float, dict]:
    """The rate of the lowest score, and what a row says of the choice.

    Args:
        model: to train; stays as it is.
        rates: each is tried on a copy, with a schedule of its own.
        train: (model, rate), in place, on a part of what will be trained on.
        score: of what it made.
    """
    tried = {}
    for rate in rates:
        trial = copy.deepcopy(model)
        train(trial, rate)
        tried[rate] = score(trial)
        print(f"rate {rate:g}: {tried[rate]:.4f} on held-out text", flush=True)
    best = min(rates, key=lambda rate: tried[rate])
    return best, {"rates_tried": {f"{rate:g}": found for rate, found in tried.items()}}
