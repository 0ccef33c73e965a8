"""The model that another one is trained towards: loaded, and run on the other's inputs."""

from __future__ import annotations

import os
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

#: what a model's forward takes for its loss and a teacher must not get
LOSS_INPUTS = ("labels", "shift_labels", "num_items_in_batch")


def load_teacher(teacher: nn.Module | str | os.PathLike[str], student: PreTrainedModel) -> nn.Module:
    """The teacher on the student's device; one given by name is a causal LM, loaded in the student's
    dtype."""
    if isinstance(teacher, (str, os.PathLike)):
        from transformers import AutoModelForCausalLM

        teacher = AutoModelForCausalLM.from_pretrained(teacher, dtype=student.dtype)
    if teacher is student:
        raise ValueError("the teacher is the model that is trained: pass the dense model, or a copy made before")
    # a dispatched teacher has hooks that bring its inputs to it
    return teacher if getattr(teacher, "hf_device_map", None) else teacher.to(student.device)


def outputs_of(
    teacher: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    device: torch.device,
    autocast: torch.dtype | None = None,
) -> Any:
    """What the teacher puts out for the arguments of a student's forward, without gradients.

    Args:
        device: of the student's outputs.
        autocast: the dtype in which the student computes under mixed precision, else None.
    """
    inputs = {name: value for name, value in kwargs.items() if name not in LOSS_INPUTS}
    if hasattr(teacher.config, "use_cache"):
        inputs["use_cache"] = False
    with torch.no_grad(), torch.autocast(device.type, autocast) if autocast else nullcontext():
        return teacher(*args, **inputs)
