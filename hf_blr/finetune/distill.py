"""Distillation from a teacher inside a stock training loop."""

from __future__ import annotations

import os
from contextlib import ExitStack, nullcontext
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.hooks import RemovableHandle

if TYPE_CHECKING:
    from transformers import PreTrainedModel

#: logits compared at a time (64 MiB as float32)
LOGITS_PER_CHUNK = 1 << 24
#: what a model's forward takes for its loss and a teacher must not get
LOSS_INPUTS = ("labels", "shift_labels", "num_items_in_batch")

#: of a model's forward
Args = tuple[Any, ...]
Kwargs = dict[str, Any]


def distillation_loss(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    mask: torch.Tensor | None = None,
    temperature: float = 1.0,
    num_items: torch.Tensor | int | None = None,
) -> torch.Tensor:
    """temperature^2 * KL(teacher || student), summed over positions and divided by `num_items`.

    Source: arXiv 1503.02531. Computed in float32 a few rows at a time, and once more in the backward pass, so
    that memory holds no float32 copy of the logits.

    Args:
        student_logits, teacher_logits: `[..., vocabulary]`.
        mask: `[...]`, true at the positions that count; None is all of them.
        temperature: both distributions are softened by it.
        num_items: None is the number of positions that count.

    Raises:
        ValueError: if the shapes differ.
    """
    if student_logits.shape != teacher_logits.shape:
        raise ValueError(
            f"teacher and student must give logits of one shape, got {list(teacher_logits.shape)} and "
            f"{list(student_logits.shape)}: they need the same tokenizer and vocabulary"
        )
    if mask is None:
        mask = torch.ones(student_logits.shape[:-1], dtype=torch.bool, device=student_logits.device)
    rows = max(1, LOGITS_PER_CHUNK // student_logits.shape[-1])
    flat = (
        student_logits.flatten(0, -2),
        teacher_logits.to(student_logits.device).flatten(0, -2),
        mask.flatten(),
    )
    total = torch.zeros((), device=student_logits.device)
    for student, teacher, counts in zip(*(tensor.split(rows) for tensor in flat), strict=True):
        divergence = checkpoint(kl_divergence, student, teacher, temperature, use_reentrant=False)
        total = total + divergence[counts].sum()
    # where nothing counts, the sum is zero whatever divides it
    items = torch.as_tensor(mask.sum() if num_items is None else num_items, device=total.device)
    return temperature**2 * total / items.clamp_min(1)


def kl_divergence(student: torch.Tensor, teacher: torch.Tensor, temperature: float) -> torch.Tensor:
    """KL(teacher || student) of each row `[T]`, in float32."""
    log_student = F.log_softmax(student.float() / temperature, dim=-1)
    log_teacher = F.log_softmax(teacher.float() / temperature, dim=-1)
    return F.kl_div(log_student, log_teacher, reduction="none", log_target=True).sum(-1)


class Distiller:
    """Mixes a teacher's divergence into the loss that a model returns, through a forward hook.

    The loss becomes (1 - weight) * the model's own + weight * `distillation_loss`, over the same positions
    and divided by the same count (the `num_items_in_batch` of the `Trainer`, where it passes one). In
    evaluation mode nothing changes.

    Args:
        teacher: a model that takes the student's inputs; runs without gradients.
        weight: in (0, 1].
        temperature: see `distillation_loss`.
        shifts_labels: position t predicts label t + 1, as in a causal language model.
        autocast: the dtype in which the student computes under mixed precision, else None.
    """

    def __init__(
        self,
        teacher: nn.Module,
        weight: float,
        temperature: float,
        shifts_labels: bool,
        autocast: torch.dtype | None = None,
    ):
        self.teacher = teacher.eval()
        self.weight = weight
        self.temperature = temperature
        self.shifts_labels = shifts_labels
        self.autocast = autocast
        self.handle: RemovableHandle | None = None
        # loss * count, divergence * count, count: kept on the device so that no step waits for them
        self.sums: torch.Tensor | None = None

    def attach(self, model: nn.Module) -> None:
        self.detach()
        # always_call: a forward that raises must not leave the hook behind
        self.handle = model.register_forward_hook(self.hook, with_kwargs=True, always_call=True)

    def detach(self) -> None:
        if self.handle is not None:
            self.handle.remove()
            self.handle = None

    # compiled code keeps calling the hooks that it was traced with, so this one looks whether it is attached
    @torch.compiler.disable
    def hook(self, model: nn.Module, args: Args, kwargs: Kwargs, output: Any) -> Any:
        if output is None:
            self.detach()
            return None
        if self.handle is None or not model.training:
            return None
        with ExitStack() as undo:
            # an error of our own must not leave the hook behind either
            undo.callback(self.detach)
            output.loss = self.mixed_loss(model, args, kwargs, output)
            undo.pop_all()
        return output

    def mixed_loss(self, model: nn.Module, args: Args, kwargs: Kwargs, output: Any) -> torch.Tensor:
        loss, logits = getattr(output, "loss", None), getattr(output, "logits", None)
        if loss is None or logits is None:
            raise ValueError(
                f"distillation needs the loss and the logits of {type(model).__name__}: have labels in the "
                "dataset, and give the Trainer neither label_smoothing_factor nor compute_loss_func, which "
                "keep the labels from the model"
            )
        teacher_logits = self.teacher_logits(args, kwargs, logits.device)
        mask = self.scored_positions(kwargs, logits)
        num_items = kwargs.get("num_items_in_batch")
        if num_items is None and not mask.any():
            # the model's own loss is a mean over nothing; a NaN of it would reach every factor
            return 0 * logits.sum()
        divergence = distillation_loss(logits, teacher_logits, mask, self.temperature, num_items)
        self.count(loss, divergence, mask.sum(), num_items)
        return (1 - self.weight) * loss + self.weight * divergence

    def teacher_logits(self, args: Args, kwargs: Kwargs, device: torch.device) -> torch.Tensor:
        inputs = {name: value for name, value in kwargs.items() if name not in LOSS_INPUTS}
        if hasattr(self.teacher.config, "use_cache"):
            inputs["use_cache"] = False
        autocast = torch.autocast(device.type, self.autocast) if self.autocast else nullcontext()
        with torch.no_grad(), autocast:
            return self.teacher(*args, **inputs).logits

    def scored_positions(self, kwargs: Kwargs, logits: torch.Tensor) -> torch.Tensor:
        """`[...]`, true where the model's own loss has a target."""
        labels = kwargs.get("shift_labels")
        if labels is None:
            labels = kwargs["labels"]
            if self.shifts_labels:
                labels = F.pad(labels[..., 1:], (0, 1), value=-100)
        if labels.shape != logits.shape[:-1]:
            raise NotImplementedError(
                "distillation is for models with one label per row of logits, "
                f"got labels {list(labels.shape)} and logits {list(logits.shape)}"
            )
        return labels.to(logits.device) != -100

    def count(
        self,
        loss: torch.Tensor,
        divergence: torch.Tensor,
        count: torch.Tensor,
        num_items: torch.Tensor | int | None,
    ) -> None:
        items = count if num_items is None else num_items
        new = torch.stack([(loss * items).detach(), (divergence * items).detach(), count.to(loss.dtype)])
        self.sums = new if self.sums is None else self.sums + new

    def pop_metrics(self) -> dict[str, float]:
        """Mean `lm_loss` and `distill_loss` per scored position since the last call, over all processes.

        Nothing where no position was scored.
        """
        if self.sums is None:
            return {}
        sums, self.sums = self.sums, None
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(sums)
        loss, divergence, count = sums.tolist()
        if count == 0:
            return {}
        return {"lm_loss": loss / count, "distill_loss": divergence / count}


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
