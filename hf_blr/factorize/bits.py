"""What a structure is handed that rounds its factors with care, and the steps that several structures take.

A matrix leaves its factors a freedom that rounding can use. Between u and v of one rank stands any invertible matrix:
a rotation spreads what few indices of the rank carry over all of them, so that numbers of a row are alike and one scale
suits them. And once v is rounded, the best u for it is a linear solve: u makes up for what v has lost.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import lru_cache

import torch
from torch import Tensor

from hf_blr.factorize.gram import solve_psd
from hf_blr.factorize.metric import OutputMetric, regroup
from hf_blr.factorize.roots import Roots
from hf_blr.factorize.rounding import rounded_in_metric
from hf_blr.formats import Bits, Codes

#: of G where rows make up for each other. A few tokens with large gradients make most of it (of 98 thousand in one
#: v_proj what 93 equal ones would), and what they say between rows is not true of other text
LEAST_DAMPING = 0.5
#: numbers of rotations of which many are kept (2 MB each)
SMALL = 1 << 18


@dataclass(frozen=True)
class ToRound:
    """A fitted layer whose factors are to become codes.

    weight: W `[N, K]`, float32. gram: H `[K, K]`, damped, or None for inputs that weigh alike. metric: of the outputs,
    as the fit had it, for structures that it weighs; the best u for given v is the same in any. coupling: G in blocks
    `[B2, Q, Q]`, of `coupling_of`, or None for outputs that weigh alike. storage: the format. seed: of rotations.
    roots: of these metrics, which problems of other formats may share.
    """

    weight: Tensor
    gram: Tensor | None
    metric: OutputMetric | None
    coupling: Tensor | None
    storage: Bits
    seed: int
    roots: Roots = field(default_factory=Roots)

    @property
    def input_gram(self) -> Tensor:
        """H, the identity where no inputs are known."""
        if self.gram is not None:
            return self.gram
        return torch.eye(self.weight.shape[1], dtype=self.weight.dtype, device=self.weight.device)

    def round(self, factor: Tensor, gram: Tensor | None, rows: Tensor | None = None) -> Codes:
        """The codes of a factor `[..., n, k]` that multiplies what has the Gram matrix `[..., k, k]`.

        rows: the metric `[..., n, n]` of what it puts out, of a single factor also `[1, n, n]`; None where that weighs
            alike.
        """
        return rounded_in_metric(factor, gram, self.storage, rows, self.roots)

    def behind(self, u: Tensor) -> Tensor:
        """The metric `[B2, R, R]` of what u `[B2, Q, R]` multiplies: u^T G u."""
        wide = u.double()
        return wide.mT @ (wide if self.coupling is None else self.coupling.double() @ wide)


def coupling_of(output_gram: Tensor | None, blocks: int, damping: float, features: int) -> Tensor | None:
    """G as rounding sees it: in this many diagonal blocks `[blocks, Q, Q]`, with a mean diagonal of one, and damped.

    Feedback between rows believes what G says between them, and G is estimated from as many rows as H is. So its
    damping grows with the features as that of `damping_of`, from `LEAST_DAMPING` on.

    Args:
        output_gram: as in `factorize`.
        damping: that of H `[features, features]`.
    """
    if output_gram is None:
        return None
    gram = regroup(output_gram.double(), blocks)
    mean = gram.diagonal(dim1=-2, dim2=-1).mean()
    if not mean > 0:
        return None
    outputs = len(gram) * gram.shape[-1]
    gram = gram / mean
    by_rows = damping * math.sqrt(outputs / features)
    gram.diagonal(dim1=-2, dim2=-1).add_(min(1.0, max(LEAST_DAMPING, by_rows)))
    return gram


def rotation(rank: int, seed: int, like: Tensor, *batch: int) -> Tensor:
    """Random orthogonal matrices `[*batch, R, R]`, in the dtype and on the device of `like`."""
    kept = small_rotation if rank**2 * math.prod(batch) <= SMALL else large_rotation
    return kept(rank, seed, *batch).to(like)


def drawn_rotation(rank: int, seed: int, *batch: int) -> Tensor:
    """In float64 on the CPU, so that every device takes the same. Shared: not to be written to."""
    noise = torch.randn(*batch, rank, rank, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.linalg.qr(noise)[0]


# the formats and layers that are tried ask for the same ones, and groups leave few ranks; a large one takes 100 MB
small_rotation, large_rotation = (lru_cache(maxsize=count)(drawn_rotation) for count in (64, 4))


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
