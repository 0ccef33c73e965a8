"""Distillation from a teacher inside a stock training loop."""

from __future__ import annotations

import os
from contextlib import ExitStack, nullcontext
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers.loss.loss_utils import ForCausalLMLoss

from hf_blr.calibration.losses import predicted
from hf_blr.calibration.padding import predicted_positions
from hf_blr.finetune.divergence import feature_loss, sums

if TYPE_CHECKING:
    from transformers import PreTrainedModel

#: what a model's forward takes for its loss and a teacher must not get
LOSS_INPUTS = ("labels", "shift_labels", "num_items_in_batch")

#: of a model's forward
Args = tuple[Any, ...]
Kwargs = dict[str, Any]


class Distiller:
    """Mixes a teacher's divergence into the loss that a model returns, through a forward hook.

    The loss becomes (1 - weight) * the model's own + weight * `distillation_loss`, over the same positions
    and divided by the same count (the `num_items_in_batch` of the `Trainer`, where it passes one). A causal language
    model whose own loss is nothing but the cross-entropy gets no labels, since both come from one pass over its logits.
    A model that has no logits, such as a sentence encoder, has no loss of its own; `feature_loss` becomes its loss, at
    its positions that `attention_mask` does not hide. In evaluation mode nothing changes.

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
        self.handles: list[RemovableHandle] = []
        #: what the model is called with for its loss
        self.given: Kwargs = {}
        # count, divergence * count, loss * count: kept on the device so that no step waits for them
        self.sums: torch.Tensor | None = None

    def attach(self, model: nn.Module) -> None:
        self.detach()
        self.handles = [
            model.register_forward_pre_hook(self.take, with_kwargs=True),
            # always_call: a forward that raises must not leave the hooks behind
            model.register_forward_hook(self.hook, with_kwargs=True, always_call=True),
        ]

    def detach(self) -> None:
        for handle in self.handles:
            handle.remove()
        self.handles = []

    @torch.compiler.disable
    def take(self, model: nn.Module, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
        """Notes what the loss needs, and takes it from a model whose own loss comes with the divergence."""
        self.given = {name: kwargs[name] for name in LOSS_INPUTS if kwargs.get(name) is not None}
        if not self.handles or not model.training or not self.shifts_labels or not has_plain_loss(model):
            return args, kwargs
        return args, {name: value for name, value in kwargs.items() if name not in LOSS_INPUTS}

    # compiled code keeps calling the hooks that it was traced with, so this one looks whether it is attached
    @torch.compiler.disable
    def hook(self, model: nn.Module, args: Args, kwargs: Kwargs, output: Any) -> Any:
        if output is None:
            self.detach()
            return None
        if not self.handles or not model.training:
            return None
        with ExitStack() as undo:
            # an error of our own must not leave the hooks behind either
            undo.callback(self.detach)
            if getattr(output, "logits", None) is None and not hasattr(output, "loss"):
                output["loss"] = self.loss_of_features(model, args, kwargs, output)
            else:
                output.loss = self.mixed_loss(model, args, kwargs, output)
            undo.pop_all()
        return output

    def mixed_loss(self, model: nn.Module, args: Args, kwargs: Kwargs, output: Any) -> torch.Tensor:
        loss, logits = getattr(output, "loss", None), getattr(output, "logits", None)
        labels = self.labels()
        if labels is None or logits is None or (loss is None and not self.shifts_labels):
            raise ValueError(
                f"distillation needs the loss and the logits of {type(model).__name__}: have labels in the "
                "dataset, give the Trainer neither label_smoothing_factor nor compute_loss_func, which keep the "
                'labels from the model, and TRL\'s SFTConfig loss_type="nll", as its other losses do without the logits'
            )
        if labels.shape != logits.shape[:-1]:
            raise NotImplementedError(
                "distillation is for models with one label per row of logits, "
                f"got labels {list(labels.shape)} and logits {list(logits.shape)}"
            )
        labels = labels.to(logits.device)
        mask = labels != -100
        count = mask.sum()
        num_items = self.given.get("num_items_in_batch")
        if loss is not None and num_items is None and not count:
            # the model's own loss is a mean over nothing; a NaN of it would reach every factor
            return 0 * logits.sum()
        teacher_logits = self.teacher_output(args, kwargs, logits.device).logits
        divergence, own = sums(logits, teacher_logits, labels, mask, self.temperature)
        items = torch.as_tensor(count if num_items is None else num_items, device=logits.device)
        divergence = divergence / items.clamp_min(1)
        loss = own / items.clamp_min(1) if loss is None else loss
        self.count(count, divergence * items, loss * items)
        return (1 - self.weight) * loss + self.weight * divergence

    def loss_of_features(self, model: nn.Module, args: Args, kwargs: Kwargs, output: Any) -> torch.Tensor:
        student = predicted(model, output)
        device = next(iter(student.values())).device
        loss, count = feature_loss(
            student,
            predicted(self.teacher, self.teacher_output(args, kwargs, device)),
            predicted_positions(kwargs, model),
        )
        self.count(count, loss * count)
        return loss

    def teacher_output(self, args: Args, kwargs: Kwargs, device: torch.device) -> Any:
        inputs = {name: value for name, value in kwargs.items() if name not in LOSS_INPUTS}
        if hasattr(self.teacher.config, "use_cache"):
            inputs["use_cache"] = False
        autocast = torch.autocast(device.type, self.autocast) if self.autocast else nullcontext()
        with torch.no_grad(), autocast:
            return self.teacher(*args, **inputs)

    def labels(self) -> torch.Tensor | None:
        """`[...]`, the target of each row of logits, -100 for none; None where the model got no labels."""
        shifted, labels = self.given.get("shift_labels"), self.given.get("labels")
        if shifted is None and labels is not None and self.shifts_labels:
            return F.pad(labels[..., 1:], (0, 1), value=-100)
        return labels if shifted is None else shifted

    def count(self, count: torch.Tensor, divergence: torch.Tensor, loss: torch.Tensor | None = None) -> None:
        """Adds a batch's number of positions, and its sums of the divergence and of the model's own loss."""
        sums = [divergence] if loss is None else [divergence, loss]
        new = torch.stack([count.to(divergence.dtype), *(each.detach() for each in sums)])
        self.sums = new if self.sums is None else self.sums + new

    def pop_metrics(self) -> dict[str, float]:
        """Mean `distill_loss` and, where there is one, `lm_loss` per scored position since the last call, over all
        processes; nothing where no position was scored."""
        if self.sums is None:
            return {}
        sums, self.sums = self.sums, None
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(sums)
        count, *found = sums.tolist()
        means = [total / count for total in found] if count else []
        return dict(zip(("distill_loss", "lm_loss"), means, strict=False))


def has_plain_loss(model: nn.Module) -> bool:
    """Whether a causal language model's own loss is the cross-entropy of its logits and nothing else."""
    config: Any = getattr(model, "config", None)
    # routers add a loss of their own
    balanced = getattr(config, "output_router_logits", False)
    return not balanced and getattr(model, "loss_function", None) is ForCausalLMLoss


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
