"""Symmetric integers of 2, 3, 4 or 8 bits: compressed-tensors' `pack-quantized`."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_blr.formats import words
from hf_blr.formats.bits import SCALE_DTYPE, Bits, Parts
from hf_blr.formats.codes import Codes
from hf_blr.structures import CODES, SCALE, SHAPE, StoredTensor

#: scales that are tried for a group, down to this fraction of the one that clips nothing. On normally distributed rows
#: of 4096 that takes the relative error from 0.15 to 0.11 in 4 bits, from 0.35 to 0.20 in 3 and from 0.89 to 0.39 in 2;
#: with 8 bits it gains nothing
SMALLEST_SCALE, SCALES, CLIPS_BELOW = 0.2, 24, 8
#: numbers that are scaled at a time: what stays near a CPU's cache (8 MiB); a GPU waits for launches rather (256 MiB)
AT_ONCE = {"cpu": 1 << 21, "cuda": 1 << 26}


@dataclass(frozen=True)
class Integer(Bits):
    """Codes in [-2^(bits-1), 2^(bits-1)), packed along each row into 32-bit words.

    A factor `[..., n, k]` is kept as `weight_packed` `[..., n, words]` int32, `weight_scale` `[..., n, groups]`
    bfloat16 and `weight_shape`, its shape as int64.
    """

    def parts(self, shape: tuple[int, ...]) -> dict[str, StoredTensor]:
        return {
            "weight_packed": StoredTensor((*shape[:-1], words.words_for(shape[-1], self.bits)), CODES),
            "weight_scale": StoredTensor(self.scale_shape(shape), SCALE),
            "weight_shape": StoredTensor((len(shape),), SHAPE),
        }

    @property
    def limits(self) -> tuple[float, float]:
        return self.lowest, self.highest

    @property
    def lowest(self) -> int:
        return -(1 << (self.bits - 1))

    @property
    def highest(self) -> int:
        return -self.lowest - 1

    def fractions(self, device: torch.device) -> Tensor:
        steps = torch.arange(SCALES if self.bits < CLIPS_BELOW else 1, device=device) / (SCALES - 1)
        return SMALLEST_SCALE**steps

    def scales(self, factor: Tensor) -> Tensor:
        """Of least squared error for each group, among scales down to a fraction of the one that clips nothing."""
        groups = factor.unflatten(-1, (-1, self.group_size or factor.shape[-1]))
        full = torch.maximum(groups.amax(-1) / self.highest, groups.amin(-1) / self.lowest)
        # a group of zeros takes any scale
        full = torch.where(full > 0, full, 1.0)
        best, least = full.to(SCALE_DTYPE), torch.full_like(full, float("inf"))
        # as many together as a large factor leaves room for
        together = AT_ONCE["cpu" if factor.device.type == "cpu" else "cuda"] // max(1, factor.numel())
        for some in self.fractions(factor.device).to(factor.dtype).split(max(1, together)):
            scale = (some.view(-1, *[1] * full.dim()) * full).to(SCALE_DTYPE).clamp_min(torch.finfo(SCALE_DTYPE).tiny)
            wide = scale.to(factor.dtype).unsqueeze(-1)
            error, place = (self.clamped(groups / wide) * wide - groups).square().sum(-1).min(0)
            found = scale.gather(0, place.unsqueeze(0))[0]
            best, least = torch.where(error < least, found, best), torch.minimum(error, least)
        return best

    def rounded(self, factor: Tensor, scale: Tensor) -> Codes:
        groups = factor.unflatten(-1, (scale.shape[-1], -1))
        values = self.clamped(groups / scale.to(factor.dtype).unsqueeze(-1))
        return Codes(values.to(torch.int8).flatten(-2), scale)

    def clamped(self, values: Tensor) -> Tensor:
        return values.round().clamp_(self.lowest, self.highest)

    def laid_out(self, codes: Codes) -> dict[str, Tensor]:
        shape = torch.tensor(codes.values.shape, dtype=torch.int64)
        return {
            "weight_packed": words.pack(codes.values, self.bits),
            "weight_scale": codes.scale,
            "weight_shape": shape,
        }

    def codes(self, parts: Parts, shape: tuple[int, ...]) -> Codes:
        return Codes(words.unpack(parts["weight_packed"], self.bits, shape[-1]), parts["weight_scale"])

    def fault(self, parts: Parts, shape: tuple[int, ...]) -> str | None:
        if parts["weight_shape"].tolist() != list(shape):
            return f"weight_shape must say {list(shape)}, got {parts['weight_shape'].tolist()}"
        if not words.leftover_is_zero(parts["weight_packed"], self.bits, shape[-1]):
            return f"weight_packed has bits behind the last of {shape[-1]} numbers, which must be zero"
        return super().fault(parts, shape)

    def check_codes(self, name: str, codes: Codes, shape: tuple[int, ...]) -> None:
        values = codes.values
        if values.dtype != torch.int8 or bool(((values < self.lowest) | (values > self.highest)).any()):
            raise ValueError(
                f"codes of {name} must be int8 in [{self.lowest}, {self.highest}] for {self.name}, got {values.dtype} "
                f"in [{values.min().item()}, {values.max().item()}]"
            )
        super().check_codes(name, codes, shape)
