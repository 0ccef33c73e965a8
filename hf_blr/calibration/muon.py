"""Steps of factors along the nearest orthogonal matrix, many factors at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

#: of the iteration x <- a x + b (x x^T) x + c (x x^T)^2 x, which brings all singular values near one in five rounds
A, B, C = 3.4445, -4.7750, 2.0315
ROUNDS = 5
MOMENTUM = 0.95
#: the root mean square of a step over its learning rate, that of AdamW's steps
STEP = 0.2
#: rows and columns are filled up with zeros to multiples of it, so that matrices of a few sizes remain
MULTIPLE = 64

Group = dict[str, Any]


class Muon(torch.optim.Optimizer):
    """Momentum whose steps move all directions of a matrix alike (Muon; step sizes of arXiv 2502.16982).

    Adam steps along each number by itself. What a factor multiplies is another factor, so its gradient is large in few
    directions; the nearest orthogonal matrix, U V^T of U S V^T, is large in all of them. The same numbers as
    `torch.optim.Muon`, which steps one matrix at a time and takes a GPU's host nine times as long for the
    factors of a model.

    Args:
        matrices: groups of parameters `[..., n, m]`, batches of matrices.
        others: groups of what is no matrix, such as factors that multiply elementwise: AdamW steps them.
    """

    def __init__(self, matrices: Sequence[Group], others: Sequence[Group] = ()):
        super().__init__([*matrices, *others], {"lr": 1e-3})
        self.of_matrices = self.param_groups[: len(matrices)]
        self.adam = None
        if others:
            on_gpu = all(p.is_cuda for group in others for p in group["params"])
            # the same dicts, so that a schedule reaches them
            rest = self.param_groups[len(matrices) :]
            self.adam = torch.optim.AdamW(rest, betas=(0.9, 0.95), weight_decay=0.0, fused=on_gpu)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        alike: dict[Any, list[tuple[Tensor, Tensor, float]]] = {}
        for group in self.of_matrices:
            parameters = [p for p in group["params"] if p.grad is not None]
            for p, along in zip(parameters, self.averaged(parameters), strict=True):
                for matrix, step in zip(wide_matrices(p), wide_matrices(along), strict=True):
                    size = tuple(-(-n // MULTIPLE) * MULTIPLE for n in matrix.shape)
                    alike.setdefault((matrix.device, size), []).append((matrix, step, group["lr"]))
        for (_, size), each in alike.items():
            move([matrix for matrix, *_ in each], [step for _, step, _ in each], [rate for *_, rate in each], size)
        if self.adam is not None:
            self.adam.step()
        return loss

    def averaged(self, parameters: list[nn.Parameter]) -> tuple[Tensor, ...]:
        """The gradients' running means, one step ahead (Nesterov)."""
        if not parameters:
            return ()
        for p in parameters:
            if "mean" not in self.state[p]:
                self.state[p]["mean"] = torch.zeros_like(p)
        means = [self.state[p]["mean"] for p in parameters]
        gradients: list[Any] = [p.grad for p in parameters]
        torch._foreach_lerp_(means, gradients, 1 - MOMENTUM)
        return torch._foreach_lerp(gradients, means, MOMENTUM)


def wide_matrices(x: Tensor) -> list[Tensor]:
    """Views `[n, m]`, n at most m, of the matrices of x `[..., n, m]` or `[..., m, n]`."""
    x = x if x.shape[-2] <= x.shape[-1] else x.mT
    # a view, or an error: what is moved is the parameter
    return [x] if x.dim() == 2 else list(x.view(-1, *x.shape[-2:]))


def move(matrices: list[Tensor], along: list[Tensor], rates: list[float], size: tuple[int, ...]) -> None:
    """Moves matrices `[n, m]` against the orthogonal matrices nearest to `along`, in place.

    Args:
        rates: the root mean square of a step is 0.2 of its rate.
        size: of all of them, filled up with zeros, which stay zeros.
    """
    device = matrices[0].device
    # singular values end within a third of one in either
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    x = torch.zeros(len(matrices), *size, dtype=dtype, device=device)
    torch._foreach_copy_(cut_to(x, along), along)
    sizes = [-rate * STEP * math.sqrt(matrix.shape[1]) for matrix, rate in zip(matrices, rates, strict=True)]
    x = orthogonal(x).float() * torch.tensor(sizes).to(device, non_blocking=True)[:, None, None]
    torch._foreach_add_(matrices, cut_to(x, matrices))


def cut_to(x: Tensor, like: list[Tensor]) -> list[Tensor]:
    return [each[: other.shape[0], : other.shape[1]] for each, other in zip(x, like, strict=True)]


def orthogonal(x: Tensor) -> Tensor:
    """About U V^T of each x = U S V^T, `[b, n, m]` with n at most m."""
    x = x / torch.linalg.vector_norm(x, dim=(-1, -2), keepdim=True, dtype=torch.float32).clamp_min(1e-7).to(x.dtype)
    for _ in range(ROUNDS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=B, alpha=C), x, beta=A)
    return x
