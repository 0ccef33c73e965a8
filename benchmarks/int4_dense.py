"""Dense layers in four bits, what every structure is measured against at equal bytes, by PyTorch's int4 kernel."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_blr.targets import find_targets

GROUP = 64
#: of a weight: four, and a scale and a zero of 16 bits for each group
BITS = 4 + 32 / GROUP
#: rows of x above which the weight is dequantised for a product of its own
FEW = 32


def rounded_model(dense: nn.Module) -> tuple[nn.Module, int]:
    """A copy whose projections are rounded, and how many numbers those hold."""
    model = copy.deepcopy(dense)
    names, count = find_targets(model), 0
    rotations: dict[int, Tensor] = {}
    for name in names:
        weight = model.get_submodule(name).weight
        k, count = weight.shape[1], count + weight.numel()
        if k not in rotations:
            generator = torch.Generator().manual_seed(k)
            rotations[k] = torch.linalg.qr(torch.randn(k, k, generator=generator))[0].to(weight)
        with torch.no_grad():
            weight.copy_(rounded(weight @ rotations[k]) @ rotations[k].T)
    return model, count


def rounded(weight: Tensor) -> Tensor:
    """The nearest of 16 levels in each group of each row `[N, K]`."""
    levels, scale, low = quantised(weight)
    return (levels * scale + low).view(weight.shape).to(weight.dtype)


def quantised(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Levels 0 to 15 `[N, K/GROUP, GROUP]`, and scale and lowest value `[N, K/GROUP, 1]` of each group, in float32."""
    groups = weight.float().unflatten(1, (-1, GROUP))
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    scale = ((high - low) / 15).clamp_min(1e-8)
    return ((groups - low) / scale).round().clamp(0, 15), scale, low


class Int4Linear(nn.Module):
    """y = x W^T with W in four bits: by PyTorch's int4 kernel at few rows, dequantised at many."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        levels, scale, low = quantised(linear.weight.detach())
        packed = levels.flatten(1).to(torch.uint8)
        packed = packed[:, ::2] << 4 | packed[:, 1::2]
        # the kernel's zero is what the level 8 stands for
        zeros = low + 8 * scale
        scales = torch.cat([scale, zeros], -1).transpose(0, 1).to(torch.bfloat16)
        self.register_buffer("tiles", torch.ops.aten._convert_weight_to_int4pack(packed, 8))
        self.register_buffer("scales", scales.contiguous())
        self.register_buffer("packed", packed)
        self.register_buffer("scale", scale.to(torch.bfloat16))
        self.register_buffer("low", low.to(torch.bfloat16))

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        if rows.shape[0] <= FEW:
            out = torch.ops.aten._weight_int4pack_mm(rows, self.tiles, GROUP, self.scales)
        else:
            levels = torch.stack([self.packed >> 4, self.packed & 15], -1).flatten(1).unflatten(1, (-1, GROUP))
            out = F.linear(rows, (levels * self.scale + self.low).flatten(1))
        return out.view(*x.shape[:-1], out.shape[-1])


def int4_model(model: nn.Module) -> nn.Module:
    """The model with its projections in four bits, in place."""
    for name in find_targets(model):
        model.set_submodule(name, Int4Linear(model.get_submodule(name)))
    return model
