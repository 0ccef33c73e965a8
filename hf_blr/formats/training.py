"""The form in which a factor in bits trains: its scales, and where wanted its codes, straight-through."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from hf_blr.formats.bits import SCALE_DTYPE, Bits
from hf_blr.formats.codes import Codes
from hf_blr.formats.holder import FactorInBits, NeverCast

#: a scale stays finite and positive wherever steps take its logarithm
RANGE = math.log(torch.finfo(SCALE_DTYPE).tiny), math.log(torch.finfo(SCALE_DTYPE).max)
GOLDEN = (math.sqrt(5) - 1) / 2


class FactorInTraining(NeverCast):
    """A factor in bits for the time of a training; called with a dtype, it gives the rounded factor.

    A number is scale * code, with the scale in bfloat16 and the code on the format's grid, as they are stored.
    Gradients take both roundings for the identity (the straight-through estimator, arXiv 1308.3432). State dicts hold
    codes and scales in the format's layout, and nothing else: checkpoints of a training are checkpoints of the model.

    log_scale: logarithms of the scales `[..., n, groups]`, float32, so that a step is relative.
    latent: what is rounded `[..., n, k]`, float32: codes times `start`, so that a step is one of the numbers that they
        stand for, whatever the format; it begins spread over the cells of the codes. Where codes do not train, the
        codes themselves in units of `Bits.spacing` in bfloat16, which holds all of them.
    start: the scales of the beginning `[..., n, groups]`, float32.

    Args:
        held: the factor as it is stored; its tensors stay as they are.
        codes: whether codes train.
    """

    start: Tensor

    def __init__(self, held: FactorInBits, codes: bool):
        super().__init__()
        self.storage, self.shape = held.storage, held.shape
        now = held.codes()
        values, scale = now.values.float(), now.scale.float()
        self.log_scale = nn.Parameter(scale.log())
        self.register_buffer("start", scale, persistent=False)
        latent = spread(values, scale, held.storage) if codes else (values / held.storage.spacing).to(torch.bfloat16)
        self.latent = nn.Parameter(latent, requires_grad=codes)

    @property
    def codes_train(self) -> bool:
        return self.latent.dtype == torch.float32

    def forward(self, dtype: torch.dtype, chosen: Tensor | None = None) -> Tensor:
        """The factor `[..., n, k]` in this dtype, differentiable in what trains; chosen: of these experts alone."""
        values = self.values()
        if self.codes_train:
            values = through(values, on_grid(values, self.storage).float())
        scale = self.log_scale.clamp(*RANGE).exp()
        scale = through(scale, scale.to(SCALE_DTYPE).float())
        factor = by_groups(values, scale).to(dtype)
        return factor if chosen is None else factor.index_select(0, chosen)

    def values(self) -> Tensor:
        """The codes before they are rounded `[..., n, k]`, in units of their scales."""
        if self.codes_train:
            return by_groups(self.latent, 1 / self.start)
        return self.latent * self.storage.spacing

    def scale(self, number: float) -> None:
        """Multiply the factor by a positive number, in place."""
        self.log_scale.data.add_(math.log(number))

    def stored(self) -> FactorInBits:
        """The factor in the form in which it is kept, with the codes and scales of this moment."""
        held = FactorInBits(self.storage, self.shape, self.log_scale.device)
        values = on_grid(self.values().detach().float(), self.storage)
        scale = self.log_scale.detach().clamp(*RANGE).exp().to(SCALE_DTYPE)
        held.take(Codes(values, scale))
        return held

    def parts(self) -> dict[str, Tensor]:
        return self.stored().parts()

    def follow(self, held: FactorInBits) -> None:
        """Goes on from these codes and scales; where it stands for them already, from where it is."""
        parts = self.parts()
        if all(torch.equal(part, parts[name]) for name, part in held.parts().items()):
            return
        other = FactorInTraining(held, self.codes_train)
        self.start.copy_(other.start)
        self.log_scale.data.copy_(other.log_scale.data)
        self.latent.data.copy_(other.latent.data)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        self.stored()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, *args: Any) -> None:
        held = self.stored()
        held._load_from_state_dict(*args)
        self.follow(held)

    def extra_repr(self) -> str:
        trains = "codes and scales" if self.codes_train else "scales"
        return f"shape={self.shape}, storage={self.storage.name}, trains={trains}"


def spread(values: Tensor, scale: Tensor, storage: Bits) -> Tensor:
    """Codes times scales as numbers that round to these codes and lie evenly over their cells, in a fixed order."""
    # multiples of the golden ratio leave no gaps, however many are taken
    steps = torch.arange(values.numel(), dtype=torch.float64, device=values.device) * GOLDEN
    inside = values + storage.spacing * (steps % 1 - 0.5).view(values.shape).float()
    numbers = by_groups(inside, scale)
    # cells of floating-point codes near zero are narrower, and what lies at an edge can fall off it
    held = on_grid(by_groups(numbers, 1 / scale), storage).float() == values
    return torch.where(held, numbers, by_groups(values, scale))


def by_groups(values: Tensor, scale: Tensor) -> Tensor:
    """Values `[..., n, k]`, each times what its group of a row has `[..., n, groups]`."""
    return (values.unflatten(-1, (scale.shape[-1], -1)) * scale.unsqueeze(-1)).flatten(-2)


def on_grid(values: Tensor, storage: Bits) -> Tensor:
    """The codes nearest to these numbers, which are codes already but for rounding."""
    return storage.rounded(values.detach(), torch.ones_like(values[..., :1])).values


def through(number: Tensor, rounded: Tensor) -> Tensor:
    """`rounded`, with a gradient that passes to `number` as it is."""
    # what is added is zero
    return rounded.detach() + (number - number.detach())
