"""The losses of rows of logits against PyTorch's, in values and gradients, in plain form and by kernels."""

import pytest
import torch
import torch.nn.functional as F

import hf_blr.ops.losses as plain
from hf_blr.ops.triton import losses as kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROWS, V = 7, 300


def case(dtype=torch.float32):
    """(student, teacher, labels, gradients of both losses); a row without a label, and one that nothing counts."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = (3 * torch.randn(ROWS, V, generator=generator) for _ in range(2))
    # a column, as labels may be cut from a larger matrix
    labels = torch.randint(0, V, (ROWS, 2), generator=generator)[:, 0]
    labels[2] = -100
    grads = torch.rand(2, ROWS, generator=generator)
    grads[:, 4] = 0
    return student.to(DEVICE, dtype), teacher.to(DEVICE, dtype), labels.to(DEVICE), grads.to(DEVICE)


def wanted(student, teacher, labels, grads, temperature):
    """(both losses, the gradient) by PyTorch's own functions, in float64."""
    student, teacher = student.double().requires_grad_(), teacher.double()
    own = F.cross_entropy(student, labels, reduction="none")
    soft = [(logits / temperature).log_softmax(-1) for logits in (student, teacher)]
    divergence = F.kl_div(*soft, reduction="none", log_target=True).sum(-1)
    total = (grads[0] * own + grads[1] * divergence).sum()
    return torch.stack([own, divergence]).detach(), torch.autograd.grad(total, student)[0]


def by_kernels(student, teacher, labels, grads, temperature):
    found, logs = kernels.losses(student, teacher, labels, 1 / temperature)
    return found, kernels.losses_backward(student, teacher, labels, logs, grads, 1 / temperature)


def by_function(student, teacher, labels, grads, temperature):
    student = student.requires_grad_()
    found = plain.losses(student, teacher, labels, temperature)
    return torch.stack(found).detach(), torch.autograd.grad(found, student, tuple(grads))[0]


@pytest.mark.parametrize("form", [by_function, by_kernels])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_values_and_gradients_are_pytorchs(monkeypatch, form, dtype, tolerance, temperature):
    # several tiles and chunks, the last of them not full
    monkeypatch.setattr(kernels, "BV", 128)
    monkeypatch.setattr(plain, "LOGITS_PER_CHUNK", 2 * V)
    given = case(dtype)
    losses, gradient = wanted(*given, temperature)
    found, found_gradient = form(*given, temperature)
    torch.testing.assert_close(found.double(), losses, rtol=1e-5, atol=1e-5)
    assert found_gradient.dtype == dtype
    torch.testing.assert_close(found_gradient.double(), gradient, rtol=tolerance, atol=tolerance / 100)


@pytest.mark.parametrize("form", [by_function, by_kernels])
def test_what_does_not_count_may_hold_anything_and_excluded_words_cost_nothing(form):
    student, teacher, labels, grads = case()
    labels[:] = -100
    student[4], teacher[4] = float("nan"), float("inf")
    teacher[:, 7], teacher[:, 8], student[:, 8] = -float("inf"), -float("inf"), -float("inf")
    found, gradient = form(student, teacher, labels, grads, 1.0)
    rest = [0, 1, 2, 3, 5, 6]
    assert not found[0, rest].any() and found[1, rest].isfinite().all()
    assert gradient.isfinite().all() and not gradient[4].any() and not gradient[:, 8].any()
    words = [i for i in range(V) if i not in (7, 8)]
    p, q = teacher[rest][:, words].softmax(-1), student.detach()[rest].softmax(-1)[:, words]
    torch.testing.assert_close(found[1, rest], (p * (p / q).log()).sum(-1), rtol=1e-5, atol=1e-5)
