"""What all formats have in common that store factors in fewer bits: codes and scales in the place of each factor.

A factor u becomes a module `u` of the layer, whose tensors have the names and layout by which compressed-tensors stores
the weight of a module: its functions take the module's tensors as they are. Factors that multiply number by number
(`BLRSpec.elementwise`) and indices stay as in the plain format.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hf_blr.formats.codes import Codes
from hf_blr.formats.plain import Factors, Format
from hf_blr.ops import InBits, numbers_in_bits
from hf_blr.ops.rules.bits import CodeForm
from hf_blr.structures import CODES, FACTOR, SCALE, SHAPE, BLRSpec, StoredTensor
from hf_blr.structures.spec import divisors

#: of scales, whatever the layer's dtype: 16 bits with the range of float32, so that none becomes zero or infinite
SCALE_DTYPE = torch.bfloat16

#: tensors of one factor by their names in its module
Parts = Mapping[str, Tensor]


@dataclass(frozen=True)
class Bits(Format):
    """A format that keeps codes and scales. One that derives from it says how they are chosen and laid out."""

    #: bits of a code
    bits: int = 8
    #: consecutive numbers of a row that share a scale; None: the whole row
    group_size: int | None = None

    #: what holds codes
    code_dtype: ClassVar[torch.dtype] = torch.int32
    #: the tensor of `parts` that holds them
    code_part: ClassVar[str] = "weight_packed"
    #: between neighbouring codes, where most numbers lie
    spacing: ClassVar[float] = 1.0

    @property
    def dtypes(self) -> dict[str, torch.dtype]:
        """{kind: dtype} of what stands in the place of a factor."""
        return {CODES: self.code_dtype, SCALE: SCALE_DTYPE, SHAPE: torch.int64}

    @property
    def form(self) -> CodeForm:
        return CodeForm(self.bits, self.group_size, self.code_dtype.is_floating_point)

    @property
    def settings(self) -> dict[str, int]:
        return {} if self.group_size is None else {"group_size": self.group_size}

    @property
    def limits(self) -> tuple[float, float]:
        """The lowest and the highest code."""
        raise NotImplementedError

    def in_bits(self, spec: BLRSpec, leading: tuple[int, ...] = ()) -> dict[str, tuple[int, ...]]:
        shapes = spec.shapes(FACTOR).items()
        return {name: (*leading, *shape) for name, shape in shapes if name not in spec.elementwise and 0 not in shape}

    def parts(self, shape: tuple[int, ...]) -> dict[str, StoredTensor]:
        """{name in the factor's module: shape and kind} for a factor `[..., n, k]`."""
        raise NotImplementedError

    def scales(self, factor: Tensor) -> Tensor:
        """The scales `[..., n, groups]` with which `rounded` comes closest to a factor `[..., n, k]`."""
        raise NotImplementedError

    def fractions(self, device: torch.device) -> Tensor:
        """Of the scale that clips nothing, those that `scales` tries `[tries]`, float32; the first is one."""
        return torch.ones(1, device=device)

    def rounded(self, factor: Tensor, scale: Tensor) -> Codes:
        """The nearest codes to a factor `[..., n, k]` with these scales `[..., n, groups]`.

        Also of a part of its columns, with the scales of their groups: what a fit that rounds column by column asks.
        """
        raise NotImplementedError

    def clamped(self, values: Tensor) -> Tensor:
        """The codes nearest to values in units of the scale, in the dtype of the values."""
        raise NotImplementedError

    def laid_out(self, codes: Codes) -> dict[str, Tensor]:
        """The tensors of `parts` that hold these codes."""
        raise NotImplementedError

    def codes(self, parts: Parts, shape: tuple[int, ...]) -> Codes:
        """The codes that tensors hold for a factor of this shape."""
        raise NotImplementedError

    def held(self, parts: Parts, shape: tuple[int, ...]) -> InBits:
        """What kernels read of a factor of this shape."""
        return InBits(parts[self.code_part], parts["weight_scale"], self.bits, shape[-1])

    def numbers(self, parts: Parts, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """The factor `[..., n, k]` that tensors hold, in this dtype."""
        numbers = numbers_in_bits(self.held(parts, shape), dtype)
        return self.codes(parts, shape).numbers(dtype) if numbers is None else numbers

    def fault(self, parts: Parts, shape: tuple[int, ...]) -> str | None:
        """What is wrong with the values of these tensors, which have the right shapes and dtypes; None if nothing."""
        scale = parts["weight_scale"]
        if not bool((torch.isfinite(scale) & (scale > 0)).all()):
            return "weight_scale must be finite and positive"
        return None

    def stored(self, spec: BLRSpec, leading: tuple[int, ...] = ()) -> dict[str, StoredTensor]:
        shapes = self.in_bits(spec, leading)
        found: dict[str, StoredTensor] = {}
        for name, tensor in super().stored(spec, leading).items():
            if name in shapes:
                found |= {f"{name}.{leaf}": part for leaf, part in self.parts(tensor.shape).items()}
            else:
                found[name] = tensor
        return found

    def dtype_of(self, kind: str, dtype: torch.dtype | None) -> torch.dtype | None:
        return self.dtypes.get(kind) or super().dtype_of(kind, dtype)

    def pack(
        self,
        spec: BLRSpec,
        tensors: Factors,
        dtype: torch.dtype,
        device: torch.device,
        leading: tuple[int, ...] = (),
    ) -> dict[str, Tensor]:
        shapes = self.in_bits(spec, leading)
        kept = super().pack(spec, {n: t for n, t in tensors.items() if n not in shapes}, dtype, device, leading)
        for name, shape in shapes.items():
            given = tensors[name]
            codes = given if isinstance(given, Codes) else self.nearest(given.float())
            if isinstance(given, Codes):
                self.check_codes(name, codes, shape)
            for leaf, part in self.laid_out(codes).items():
                kept[f"{name}.{leaf}"] = part.to(device).clone(memory_format=torch.contiguous_format)
        return {name: kept[name] for name in self.stored(spec, leading)}

    def nearest(self, factor: Tensor) -> Codes:
        """A factor `[..., n, k]` rounded to the nearest codes, with the scales that suit that best."""
        return self.rounded(factor, self.scales(factor))

    def scale_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return *shape[:-1], 1 if self.group_size is None else shape[-1] // self.group_size

    def misfit(self, spec: BLRSpec) -> str | None:
        rows = {name: shape[-1] for name, shape in self.in_bits(spec).items()}
        for name, length in rows.items():
            if self.group_size is not None and length % self.group_size:
                common = math.gcd(*rows.values())
                choices = [size for size in divisors(common) if size > 1]
                return (
                    f"rows of {name} hold {length} numbers, which groups of {self.group_size} do not divide; take "
                    + (f"a group_size of {choices}" if choices else "another rank")
                    + ", or group_size=None for one scale a row"
                )
        return None

    def waste(self, spec: BLRSpec) -> str | None:
        for name, shape in self.in_bits(spec).items():
            parts = [part for part in self.parts(shape).values() if part.kind != SHAPE]
            bits = 8 * sum(math.prod(part.shape) * self.dtypes[part.kind].itemsize for part in parts)
            if bits >= 16 * math.prod(shape):
                return (
                    f"{name} {list(shape)} takes {bits / math.prod(shape):.1f} bits a number in {self.name}, no less "
                    "than the 16 of plain; take a larger rank or group_size, or the plain format"
                )
        return None

    def check_codes(self, name: str, codes: Codes, shape: tuple[int, ...]) -> None:
        """Raises ValueError unless a fit's codes for a factor of this shape can be stored."""
        wanted = shape, self.scale_shape(shape)
        given = tuple(codes.values.shape), tuple(codes.scale.shape)
        if given != wanted or codes.scale.dtype != SCALE_DTYPE:
            raise ValueError(
                f"codes of {name} must have the shape {wanted[0]}, and scales {wanted[1]} in {SCALE_DTYPE}, got "
                f"{given[0]} and {given[1]} in {codes.scale.dtype}"
            )
        wrong = self.fault(self.laid_out(codes), shape)
        if wrong is not None:
            raise ValueError(f"codes of {name}: {wrong}")
