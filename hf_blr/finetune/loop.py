"""The stock `Trainer` with settings that suit factors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_blr.calibration.calls import Batch
from hf_blr.finetune.dataset import BatchDataset, WindowDataset


def train(
    model: nn.Module,
    windows: Tensor | Sequence[Batch],
    callbacks: list[TrainerCallback],
    optimizer: torch.optim.Optimizer | None = None,
    **arguments: Any,
) -> list[dict[str, Any]]:
    """Trains on windows `[n, seqlen]` or on ready batches; returns the Trainer's log history.

    optimizer: None leaves the Trainer's own.
    arguments: of `TrainingArguments`, `max_steps` among them, over defaults that suit factors.
    """
    settings = {
        "lr_scheduler_type": "cosine",
        "warmup_steps": max(1, arguments["max_steps"] // 20),
        # decaying two factors is not decaying their product
        "weight_decay": 0.0,
        "logging_steps": max(1, arguments["max_steps"] // 10),
        # asks the GPU after each step
        "logging_nan_inf_filter": False,
        "save_strategy": "no",
        "report_to": "none",
    }
    data: dict[str, Any]
    if torch.is_tensor(windows):
        data = {"train_dataset": WindowDataset(windows)}
    else:
        data = {"train_dataset": BatchDataset(windows), "data_collator": BatchDataset.only}
        arguments["per_device_train_batch_size"] = 1
    trainer = Trainer(
        model=model,
        args=TrainingArguments(**{**settings, **arguments}),
        **data,
        callbacks=callbacks,
        optimizers=(optimizer, None),
    )
    with forward_as_it_was(model):
        trainer.train()
    return trainer.state.log_history


@contextmanager
def forward_as_it_was(model: nn.Module) -> Iterator[None]:
    """At the end the model's forward is what it was: for mixed precision accelerate leaves another in its place, which
    would go on under autocast.
    """
    names = "forward", "_original_forward"
    before = {name: vars(model)[name] for name in names if name in vars(model)}
    try:
        yield
    finally:
        for name in names:
            vars(model).pop(name, None)
        vars(model).update(before)
