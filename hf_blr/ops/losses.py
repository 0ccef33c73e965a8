"""What a student's logits cost: against labels, and against a teacher's logits.

Both losses and their gradient come from the same logarithms of sums of exponentials. Nothing as large as the logits is
made in float32: the forward keeps three numbers a row, and the backward makes the gradient in the logits' dtype.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hf_blr.ops.dispatch import why_not_triton

#: logits that plain PyTorch compares at a time (64 MiB as float32)
LOGITS_PER_CHUNK = 1 << 24


def losses(student: Tensor, teacher: Tensor, labels: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """(cross-entropy with the labels `[T]`, KL(teacher || student) `[T]`), float32, differentiable in the student.

    Args:
        student, teacher: logits `[T, V]`.
        labels: `[T]` integers; a negative one makes that row's cross-entropy zero.
        temperature: both distributions are softened by it for the divergence.
    """
    found: tuple[Tensor, Tensor] = Losses.apply(student, teacher, labels, temperature)
    return found


class Losses(torch.autograd.Function):
    """By kernels on a GPU, in plain PyTorch elsewhere."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, labels: Tensor, temperature: float) -> Any:
        student, teacher = (t if t.stride(-1) == 1 else t.contiguous() for t in (student, teacher))
        ctx.sharpness = 1 / temperature
        ctx.kernels = student.is_cuda and why_not_triton(student, ()) is None
        if ctx.kernels:
            from hf_blr.ops.triton.losses import losses

            found, logs = losses(student, teacher, labels, ctx.sharpness)
        else:
            found, logs = plain_losses(student, teacher, labels, ctx.sharpness)
        ctx.save_for_backward(student, teacher, labels, logs)
        return found[0], found[1]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        given = (*ctx.saved_tensors, torch.stack(grads), ctx.sharpness)
        if ctx.kernels:
            from hf_blr.ops.triton.losses import losses_backward

            return losses_backward(*given), None, None, None
        return plain_gradient(*given), None, None, None


def plain_losses(student: Tensor, teacher: Tensor, labels: Tensor, sharpness: float) -> tuple[Tensor, Tensor]:
    """(losses `[2, T]`, logarithms `[3, T]` of the sums of exponentials: the student's, and both softened)."""
    chunks = max(1, LOGITS_PER_CHUNK // student.shape[-1])
    found, logs = (student.new_empty(n, len(student), dtype=torch.float32) for n in (2, 3))
    for first in range(0, len(student), chunks):
        some = slice(first, first + chunks)
        s, t, label = student[some].float(), teacher[some].float(), labels[some]
        logs[:, some] = torch.stack([x.logsumexp(-1) for x in (s, s * sharpness, t * sharpness)])
        own, soft_s, soft_t = logs[:, some]
        chosen = s.gather(-1, label.clamp_min(0)[:, None])[:, 0]
        found[0, some] = torch.where(label >= 0, own - chosen, 0)
        log_p = t * sharpness - soft_t[:, None]
        log_q = s * sharpness - soft_s[:, None]
        p = log_p.exp()
        # what the teacher excludes costs nothing, and is no number times zero
        found[1, some] = torch.where(p == 0, 0, p * (log_p - log_q)).sum(-1)
    return found, logs


def plain_gradient(
    student: Tensor, teacher: Tensor, labels: Tensor, logs: Tensor, grads: Tensor, sharpness: float
) -> Tensor:
    """By the student's logits, in their dtype."""
    chunks = max(1, LOGITS_PER_CHUNK // student.shape[-1])
    out = torch.empty_like(student)
    for first in range(0, len(student), chunks):
        some = slice(first, first + chunks)
        own, soft_s, soft_t = logs[:, some, None]
        s, t, label = student[some].float(), teacher[some].float(), labels[some]
        g_own = torch.where(label >= 0, grads[0, some], 0)[:, None]
        g_apart = (grads[1, some] * sharpness)[:, None]
        gradient = g_own * (s - own).exp()
        gradient.scatter_add_(-1, label.clamp_min(0)[:, None], -g_own)
        gradient += g_apart * ((s * sharpness - soft_s).exp() - (t * sharpness - soft_t).exp())
        # a row that does not count gets none, whatever stands in it
        out[some] = torch.where((g_own != 0) | (g_apart != 0), gradient, 0)
    return out
