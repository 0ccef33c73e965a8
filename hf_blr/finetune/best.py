"""Training that keeps the factors which did best on text that is not trained on."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_blr.calibration.held_out import HeldOut

#: how often a training looks at the held-out text, and how often in a row it may find nothing better before it stops
LOOKS, PATIENCE = 10, 3


class KeepBest(TrainerCallback):
    """Measures the divergence from the teacher on held-out text, stops when that no longer falls, and keeps the best.

    Ten times in the training, at the first step and at the last, whose checkpoint has the best factors.

    Args:
        teacher: the dense model.
        held_out: token ids `[n, seqlen]`.

    Attributes:
        history: (step, divergence in nats a token) of each measurement.
    """

    def __init__(self, teacher: nn.Module, held_out: Tensor):
        device = next(teacher.parameters()).device
        self.held_out = HeldOut(teacher, [{"input_ids": window[None].to(device)} for window in held_out.long()])
        self.history: list[tuple[int, float]] = []
        self.best: dict[str, Tensor] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        self.look(model, 0)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        if state.global_step % max(1, state.max_steps // LOOKS) and state.global_step < state.max_steps:
            return
        self.look(model, state.global_step)
        best = min(divergence for _, divergence in self.history)
        if all(divergence > best for _, divergence in self.history[-PATIENCE:]):
            control.should_training_stop = True
        # while factors in bits are still in the form that trained
        if control.should_training_stop or state.global_step >= state.max_steps:
            self.put_best(model)

    @torch.no_grad()
    def put_best(self, model: nn.Module) -> None:
        for name, parameter in model.named_parameters():
            if name in self.best:
                parameter.copy_(self.best[name])

    @property
    def log(self) -> list[dict[str, float]]:
        """`history` as a Trainer's log has it."""
        return [{"step": step, "held_out_divergence": divergence} for step, divergence in self.history]

    def look(self, model: nn.Module, step: int) -> None:
        divergence = self.held_out.divergence(model)
        if divergence is None:
            raise ValueError("the held-out text holds no window, or the model predicts no tokens; leave it out")
        # a ruined model's is no number, which compares as neither less nor more
        divergence = math.inf if math.isnan(divergence) else divergence
        if not self.history or divergence < min(seen for _, seen in self.history):
            self.best = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
        self.history.append((step, divergence))
