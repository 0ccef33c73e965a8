"""Steps of matrices along their nearest orthogonal matrix, many matrices at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

#: of the quintic iteration x <- a x + b (x x^T) x + c (x x^T)^2 x, which brings singular values near one
A, B, C = 3.4445, -4.7750, 2.0315
ROUNDS = 5
#: the root mean square of a step over its learning rate: that of AdamW's steps, so that their rates serve
SIZE = 0.2
#: matrices are padded to multiples of this, so that few shapes remain
PADDED = 64


class Muon(torch.optim.Optimizer):
    """Momentum whose steps are orthogonal (Muon, Jordan et al. 2024; sizes by arXiv 2502.16982).

    `torch.optim.Muon` steps matrix by matrix, which takes a GPU's host longer than the step itself; here all matrices
    of a padded shape step together. Parameters of more dimensions are batches of matrices.

    Args:
        params: matrices `[..., n, m]`, or groups of them.
        lr: the root mean square of a step is 0.2 of it.
        momentum: Nesterov's.
    """

    def __init__(self, params: Iterable[Any], lr: float = 3e-4, momentum: float = 0.95):
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        buckets: dict[tuple[int, int], list[tuple[Tensor, Tensor, float]]] = {}
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if not parameters:
                continue
            gradients = [p.grad for p in parameters]
            for p in parameters:
                if "momentum" not in self.state[p]:
                    self.state[p]["momentum"] = torch.zeros_like(p)
            averages = [self.state[p]["momentum"] for p in parameters]
            torch._foreach_lerp_(averages, gradients, 1 - group["momentum"])
            updates = torch._foreach_lerp(gradients, averages, group["momentum"])
            for p, update in zip(parameters, updates, strict=True):
                for matrix, step in zip(matrices(p), matrices(update), strict=True):
                    size = tuple(-(-n // PADDED) * PADDED for n in matrix.shape)
                    buckets.setdefault(size, []).append((matrix, step, group["lr"]))
        for (n, m), items in buckets.items():
            x = torch.zeros(len(items), n, m, dtype=torch.bfloat16 if items[0][0].is_cuda else torch.float32, device=items[0][0].device)
            views = [each[: p.shape[0], : p.shape[1]] for each, (p, _, _) in zip(x, items, strict=True)]
            for view, (_, update, _) in zip(views, items, strict=True):
                view.copy_(update)
            x = orthogonal(x)
            sizes = [-lr * SIZE * math.sqrt(p.shape[1]) for p, _, lr in items]
            x = x * torch.tensor(sizes, dtype=torch.float32).to(x.device, non_blocking=True)[:, None, None]
            for each, (p, _, _) in zip(x, items, strict=True):
                p.add_(each[: p.shape[0], : p.shape[1]])
        return loss


def matrices(x: Tensor) -> list[Tensor]:
    """Views `[n, m]` with n at most m."""
    x = x if x.shape[-2] <= x.shape[-1] else x.transpose(-1, -2)
    return [x] if x.dim() == 2 else list(x.flatten(0, -3))


def orthogonal(x: Tensor) -> Tensor:
    """`[b, n, m]` with n at most m: U V^T of each U S V^T, roughly."""
    x = x / x.float().norm(dim=(-1, -2), keepdim=True).clamp_min(1e-30).to(x.dtype)
    for _ in range(ROUNDS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=B, alpha=C), x, beta=A)
    return x
