"""How far a student's outputs are from a teacher's."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

#: logits compared at a time (64 MiB as float32)
LOGITS_PER_CHUNK = 1 << 24


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


def feature_loss(
    student: dict[str, torch.Tensor], teacher: dict[str, torch.Tensor], mask: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(the squared error of features over the teacher's sum of squares, of how many positions).

    Args:
        student, teacher: {name: `[..., C]`}, features of one kind under one name.
        mask: `[B, T]`, true at the positions that count, of features `[B, T, C]`; None is all of them.

    Raises:
        ValueError: if the two have different names or shapes.
    """
    shapes = [{name: tuple(values.shape) for name, values in each.items()} for each in (student, teacher)]
    if shapes[0] != shapes[1]:
        raise ValueError(f"teacher and student must give features of one shape, got {shapes[1]} and {shapes[0]}")
    first = next(iter(student.values()))
    error, energy, count = (torch.zeros((), device=first.device) for _ in range(3))
    for name, values in student.items():
        wanted = teacher[name].to(values.device)
        if mask is not None and mask.shape == values.shape[:-1]:
            values, wanted = values[mask], wanted[mask]
        error = error + (values.float() - wanted.float()).square().sum()
        energy = energy + wanted.float().square().sum()
        count = count + values.shape[:-1].numel()
    return error / energy.clamp_min(torch.finfo(energy.dtype).tiny), count
