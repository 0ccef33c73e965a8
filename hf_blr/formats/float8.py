"""Float8 (e4m3) with one scale a row: compressed-tensors' `float-quantized`."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_blr.formats.bits import SCALE_DTYPE, Bits, Parts
from hf_blr.formats.codes import Codes
from hf_blr.structures import CODES, SCALE, StoredTensor

FLOAT8 = torch.float8_e4m3fn
LARGEST = torch.finfo(FLOAT8).max


@dataclass(frozen=True)
class Float8(Bits):
    """A factor `[..., n, k]` is kept as `weight` `[..., n, k]` float8_e4m3fn and `weight_scale` `[..., n, 1]` bfloat16.

    Codes are floating-point numbers themselves, so that the scale of a row only brings its largest to the largest
    code, and no clipping pays.
    """

    code_dtype = FLOAT8
    code_part = "weight"
    # from 128 to 256
    spacing = 16.0

    @property
    def limits(self) -> tuple[float, float]:
        return -LARGEST, LARGEST

    def parts(self, shape: tuple[int, ...]) -> dict[str, StoredTensor]:
        return {"weight": StoredTensor(shape, CODES), "weight_scale": StoredTensor(self.scale_shape(shape), SCALE)}

    def scales(self, factor: Tensor) -> Tensor:
        largest = factor.abs().amax(-1, keepdim=True)
        # a row of zeros takes any scale
        scale = torch.where(largest > 0, largest / LARGEST, 1.0).to(SCALE_DTYPE)
        return scale.clamp_min(torch.finfo(SCALE_DTYPE).tiny)

    def rounded(self, factor: Tensor, scale: Tensor) -> Codes:
        return Codes(self.codes_of(factor / scale.to(factor.dtype)), scale)

    def clamped(self, values: Tensor) -> Tensor:
        return self.codes_of(values).to(values.dtype)

    def codes_of(self, values: Tensor) -> Tensor:
        # where a scale clips, releases of PyTorch make NaN of what lies beyond the largest code
        return values.clamp(-LARGEST, LARGEST).to(FLOAT8)

    def laid_out(self, codes: Codes) -> dict[str, Tensor]:
        return {"weight": codes.values, "weight_scale": codes.scale}

    def codes(self, parts: Parts, shape: tuple[int, ...]) -> Codes:
        return Codes(parts["weight"], parts["weight_scale"])

    def fault(self, parts: Parts, shape: tuple[int, ...]) -> str | None:
        # e4m3 has no infinity, and NaN in the two patterns of all ones
        if bool(((parts["weight"].view(torch.uint8) & 0x7F) == 0x7F).any()):
            return "weight holds NaN"
        return super().fault(parts, shape)

    def check_codes(self, name: str, codes: Codes, shape: tuple[int, ...]) -> None:
        if codes.values.dtype != FLOAT8:
            raise ValueError(f"codes of {name} must be {FLOAT8} for {self.name}, got {codes.values.dtype}")
        super().check_codes(name, codes, shape)
