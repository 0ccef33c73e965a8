"""Layers in bits, and the dense layer in float8 that they are compared with, as functions of their tensors."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_blr.formats import Format
from hf_blr.linear import BLRLinear
from hf_blr.ops.cast import LARGEST
from hf_blr.ops.rules.bits import LEAST_FLOAT8
from hf_blr.ops.table import implementation_of
from hf_blr.structures import BLRSpec


def in_format(
    spec: BLRSpec, storage: Format, factors: list[Tensor]
) -> tuple[Callable[..., Tensor], list[Tensor], Callable[..., Tensor]]:
    """(a layer's forward (x, *stored), stored, the same in float64) of factors and indices in a format."""
    dtype, names = factors[0].dtype, spec.names()
    stored = storage.pack(spec, dict(zip(names, factors, strict=True)), dtype, factors[0].device)
    layer = BLRLinear.from_factors(spec, stored, storage=storage, dtype=dtype).eval()

    def forward(x: Tensor, *tensors: Tensor) -> Tensor:
        for key, tensor in zip(stored, tensors, strict=True):
            layer.put(key, tensor)
        return layer(x)

    def exact(x: Tensor, *tensors: Tensor) -> Tensor:
        with torch.no_grad():
            numbers = (t.double() if t.is_floating_point() else t for t in layer.tensors(torch.float64).values())
            return implementation_of(spec.structure).linear(x, *numbers)

    return forward, list(stored.values()), exact


def has_float8(device: torch.device) -> bool:
    """Whether PyTorch multiplies float8 there."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= LEAST_FLOAT8


def float8_dense(weight: Tensor) -> tuple[Callable[..., Tensor], list[Tensor], Callable[..., Tensor]]:
    """(dense forward, its weights, the same in float64) in PyTorch's own float8, a scale for each row.

    x is cast by compiled code, one kernel.
    """

    def cast(t: Tensor) -> tuple[Tensor, Tensor]:
        scale = t.float().abs().amax(-1, keepdim=True).clamp_min(1e-12) / LARGEST
        return (t.float() / scale).to(torch.float8_e4m3fn), scale

    torch._dynamo.reset()
    compiled = torch.compile(cast, dynamic=False)
    dtype = weight.dtype

    def forward(x: Tensor, rows: Tensor, scale: Tensor) -> Tensor:
        x8, x_scale = compiled(x)
        return torch._scaled_mm(x8, rows.T, x_scale, scale.T, out_dtype=dtype, use_fast_accum=True)

    def exact(x: Tensor, rows: Tensor, scale: Tensor) -> Tensor:
        return F.linear(x, rows.double() * scale.double())

    return forward, list(cast(weight)), exact
