"""What a structure is handed that rounds its factors with care, and the steps that several structures take.

A matrix leaves its factors a freedom that rounding can use. Between u and v of one rank stands any invertible matrix:
a rotation spreads what few indices of the rank carry over all of them, so that numbers of a row are alike and one scale
suits them. And once v is rounded, the best u for it is a linear solve: u makes up for what v has lost.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_blr.factorize.gram import solve_psd
from hf_blr.factorize.metric import OutputMetric
from hf_blr.factorize.rounding import rounded_in_metric
from hf_blr.formats import Bits, Codes


@dataclass(frozen=True)
class ToRound:
    """A fitted layer whose factors are to become codes.

    weight: W `[N, K]`, float32. gram: H `[K, K]`, damped, or None for inputs that weigh alike. metric: of the outputs,
    for what couples them; the best u for given v, and the rounding of rows, are the same in any. storage: the format.
    seed: of rotations.
    """

    weight: Tensor
    gram: Tensor | None
    metric: OutputMetric | None
    storage: Bits
    seed: int

    @property
    def input_gram(self) -> Tensor:
        """H, the identity where no inputs are known."""
        if self.gram is not None:
            return self.gram
        return torch.eye(self.weight.shape[1], dtype=self.weight.dtype, device=self.weight.device)

    def round(self, factor: Tensor, gram: Tensor | None) -> Codes:
        """The codes of a factor `[..., n, k]` that multiplies what has the Gram matrix `[..., k, k]`."""
        return rounded_in_metric(factor, gram, self.storage)


def rotation(rank: int, seed: int, like: Tensor, *batch: int) -> Tensor:
    """Random orthogonal matrices `[*batch, R, R]`, in the dtype and on the device of `like`."""
    # drawn on the CPU, so that every device takes the same
    noise = torch.randn(*batch, rank, rank, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.linalg.qr(noise)[0].to(like)


def refitted(weight: Tensor, rows: Tensor, gram: Tensor) -> tuple[Tensor, Tensor]:
    """The u `[..., Q, R]` that minimises ||(W - u Z) X||, and Z H Z^T `[..., R, R]`, the Gram of what it multiplies.

    Args:
        weight: W `[..., Q, K]`.
        rows: Z `[..., R, K]`.
        gram: H = X^T X `[K, K]`.
    """
    image = rows.double() @ gram.double()
    normal = image @ rows.double().mT
    u = solve_psd(normal, image @ weight.double().mT).mT
    return u.to(weight.dtype), normal.to(weight.dtype)
