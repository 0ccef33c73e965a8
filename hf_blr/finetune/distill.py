"""Distillation from a teacher inside a stock training loop."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers.loss.loss_utils import ForCausalLMLoss

from hf_blr.calibration.losses import predicted
from hf_blr.calibration.padding import predicted_positions
from hf_blr.finetune.divergence import feature_loss, sums
from hf_blr.finetune.teacher import outputs_of
from hf_blr.finetune.trainable import has_adapters
from hf_blr.targets import unwrapped

#: of a model's forward
Args = tuple[Any, ...]
Kwargs = dict[str, Any]


class Distiller:
    """Mixes a teacher's divergence into the loss that a model returns, through a forward hook.

    The loss becomes (1 - weight) * the model's own + weight * `distillation_loss`, over the same positions
    and divided by the same count (the `num_items_in_batch` of the `Trainer`, where it passes one). The
    cross-entropy of a causal language model comes with the divergence, from one pass over the logits, and not
    from the model's loss function; what else the model adds (a router's balance) stays a part of its own loss.
    A model that has no logits, such as a sentence encoder, has no loss of its own; `feature_loss` becomes its
    loss, at its positions that `attention_mask` does not hide. In evaluation mode nothing changes.

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
        #: what the model handed to its loss function in this forward
        self.handed: Kwargs | None = None
        #: puts the model's loss function back
        self.put_back = ExitStack()
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
    def take(self, model: nn.Module, args: Args, kwargs: Kwargs) -> None:
        """Takes the place of the model's loss function, where that is the cross-entropy, for one forward."""
        self.handed = None
        owner: Any = unwrapped(model)
        owner = owner.get_base_model() if has_adapters(owner) and hasattr(owner, "get_base_model") else owner
        if not self.handles or not model.training or getattr(owner, "loss_function", None) is not ForCausalLMLoss:
            return
        if (before := owner.__dict__.get("_loss_function")) is None:
            self.put_back.callback(owner.__dict__.pop, "_loss_function")
        else:
            self.put_back.callback(setattr, owner, "loss_function", before)
        owner.loss_function = self.hand_over

    @torch.compiler.disable
    def hand_over(self, logits: torch.Tensor, labels: torch.Tensor, *_: Any, **kwargs: Any) -> torch.Tensor:
        """The model's loss without the cross-entropy, to which it may add."""
        self.handed = {"labels": labels, **kwargs}
        return logits.new_zeros((), dtype=torch.float32)

    # compiled code keeps calling the hooks that it was traced with, so this one looks whether it is attached
    @torch.compiler.disable
    def hook(self, model: nn.Module, args: Args, kwargs: Kwargs, output: Any) -> Any:
        self.put_back.close()
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
        if loss is None or logits is None:
            raise ValueError(
                f"distillation needs the loss and the logits of {type(model).__name__}: have labels in the "
                "dataset, give the Trainer neither label_smoothing_factor nor compute_loss_func, which keep the "
                'labels from the model; of TRL take release 1.13 and SFTConfig loss_type="nll": its other losses, and '
                "release 1.16, make no logits"
            )
        given = kwargs if self.handed is None else self.handed
        labels = self.labels(given)
        if labels.shape != logits.shape[:-1]:
            raise NotImplementedError(
                "distillation is for models with one label per row of logits, "
                f"got labels {list(labels.shape)} and logits {list(logits.shape)}"
            )
        labels = labels.to(logits.device)
        mask = labels != -100
        count = mask.sum()
        num_items = given.get("num_items_in_batch")
        if self.handed is None and num_items is None and not count:
            # the model's own loss is a mean over nothing; a NaN of it would reach every factor
            return 0 * logits.sum()
        teacher_logits = outputs_of(self.teacher, args, kwargs, logits.device, self.autocast).logits
        targets = torch.full_like(labels, -100, dtype=torch.long) if self.handed is None else labels
        divergence, own = sums(logits, teacher_logits, targets, mask, self.temperature)
        items = torch.as_tensor(count if num_items is None else num_items, device=logits.device)
        divergence = divergence / items.clamp_min(1)
        loss = loss if self.handed is None else loss + own / items.clamp_min(1)
        self.count(count, divergence * items, loss * items)
        return (1 - self.weight) * loss + self.weight * divergence

    def loss_of_features(self, model: nn.Module, args: Args, kwargs: Kwargs, output: Any) -> torch.Tensor:
        student = predicted(model, output)
        device = next(iter(student.values())).device
        loss, count = feature_loss(
            student,
            predicted(self.teacher, outputs_of(self.teacher, args, kwargs, device, self.autocast)),
            predicted_positions(kwargs, model),
        )
        self.count(count, loss * count)
        return loss

    def labels(self, given: Kwargs) -> torch.Tensor:
        """`[...]`, the target of each row of logits, -100 for none."""
        labels: torch.Tensor | None = given.get("shift_labels")
        if labels is not None:
            return labels
        labels = given["labels"]
        return F.pad(labels[..., 1:], (0, 1), value=-100) if self.shifts_labels else labels

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
