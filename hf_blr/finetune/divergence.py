"""How far a student's outputs are from a teacher's."""

from __future__ import annotations

import torch

from hf_blr.ops.losses import losses


def distillation_loss(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    mask: torch.Tensor | None = None,
    temperature: float = 1.0,
    num_items: torch.Tensor | int | None = None,
) -> torch.Tensor:
    """temperature^2 * KL(teacher || student), summed over positions and divided by `num_items`.

    Source: arXiv 1503.02531. Computed in float32, of which memory holds no copy as large as the logits.

    Args:
        student_logits, teacher_logits: `[..., vocabulary]`.
        mask: `[...]`, true at the positions that count; None is all of them.
        temperature: both distributions are softened by it.
        num_items: None is the number of positions that count.

    Raises:
        ValueError: if the shapes differ.
    """
    if mask is None:
        mask = torch.ones(student_logits.shape[:-1], dtype=torch.bool, device=student_logits.device)
    labels = torch.full(mask.shape, -100, device=student_logits.device)
    total, _ = sums(student_logits, teacher_logits, labels, mask, temperature)
    # where nothing counts, the sum is zero whatever divides it
    items = torch.as_tensor(mask.sum() if num_items is None else num_items, device=total.device)
    return total / items.clamp_min(1)


def sums(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    labels: torch.Tensor,
    mask: torch.Tensor,
    temperature: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(temperature^2 * KL(teacher || student), cross-entropy with the labels), summed over positions that count.

    Args:
        student_logits, teacher_logits: `[..., vocabulary]`.
        labels: `[...]`; a negative one adds nothing to the second.
        mask: `[...]`, true at the positions that count.
        temperature: softens both distributions in the first.

    Raises:
        ValueError: if the shapes differ.
    """
    if student_logits.shape != teacher_logits.shape:
        raise ValueError(
            f"teacher and student must give logits of one shape, got {list(teacher_logits.shape)} and "
            f"{list(student_logits.shape)}: they need the same tokenizer and vocabulary"
        )
    own, divergence = losses(
        student_logits.flatten(0, -2),
        teacher_logits.to(student_logits.device).flatten(0, -2),
        labels.flatten(),
        temperature,
    )
    # chosen and not multiplied, since a position that does not count may hold anything; without waiting for a count
    counts = mask.flatten()
    own, divergence = (torch.where(counts, each, 0).sum() for each in (own, divergence))
    return temperature**2 * divergence, own


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
