"""Weight (and the Gram matrix of its inputs) -> factors."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hf_blr.structures import BLRSpec


@dataclass(frozen=True)
class Factors:
    """The outcome of one fit.

    tensors: {"u", ("s",) "v"} in the shapes of the spec, float32.
    rel_error: ||(W - W') X|| / ||W X|| over the calibration inputs X; Frobenius, ||W - W'|| / ||W||, without a Gram.
    rounds: of alternating solves that were run; 0 for a closed form.
    """

    tensors: dict[str, torch.Tensor]
    rel_error: float
    rounds: int


def factorize(
    weight: torch.Tensor,
    spec: BLRSpec,
    gram: torch.Tensor | None = None,
    *,
    rounds: int = 16,
    tolerance: float = 3e-3,
    damping: float = 1e-4,
    seed: int = 0,
) -> Factors:
    raise NotImplementedError("being written")
