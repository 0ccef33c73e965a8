"""Dense layers in four bits, what every structure is measured against at equal bytes, by PyTorch's int4 kernel.

Perplexities are those of GPTQ (arXiv 2210.17323) on weights rotated by a random orthogonal matrix: rotated, they lie on
no grid of the 4-bit file that the small model comes from, and outliers are spread.
"""

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


def rounded_model(dense: nn.Module, grams: dict[str, Tensor]) -> tuple[nn.Module, int]:
    """A copy whose projections are rounded by GPTQ, and how many numbers those hold.

    grams: {layer: H = X^T X `[K, K]` of its inputs}.
    """
    model = copy.deepcopy(dense)
    names, count = find_targets(model), 0
    rotations: dict[int, Tensor] = {}
    for name in names:
        weight = model.get_submodule(name).weight
        k, count = weight.shape[1], count + weight.numel()
        if k not in rotations:
            generator = torch.Generator().manual_seed(k)
            rotations[k] = torch.linalg.qr(torch.randn(k, k, generator=generator))[0].to(weight)
        rotation = rotations[k]
        gram = rotation.T @ grams[name].to(weight) @ rotation
        with torch.no_grad():
            weight.copy_(gptq(weight @ rotation, gram) @ rotation.T)
    return model, count


def gptq(weight: Tensor, gram: Tensor) -> Tensor:
    """W `[N, K]` on 16 levels in each group of each row, column by column: what is rounded off one goes to the next.

    gram `[K, K]`, damped by a hundredth of its mean diagonal, as GPTQ does.
    """
    damped = gram.double()
    damped.diagonal().add_(0.01 * damped.diagonal().mean())
    # the upper Cholesky factor of the inverse: row i says how column i's error is made up for by those after it
    factor = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True).float()
    left, out = weight.float().clone(), torch.empty_like(weight, dtype=torch.float32)
    for first in range(0, left.shape[1], GROUP):
        last = first + GROUP
        _, scale, low = (part[:, 0] for part in quantised(left[:, first:last]))
        errors = torch.empty_like(left[:, first:last])
        for i in range(first, last):
            column = left[:, i : i + 1]
            out[:, i : i + 1] = ((column - low) / scale).round().clamp(0, 15) * scale + low
            error = (column - out[:, i : i + 1]) / factor[i, i]
            left[:, i + 1 : last] -= error @ factor[i : i + 1, i + 1 : last]
            errors[:, i - first : i - first + 1] = error
        left[:, last:] -= errors @ factor[first:last, last:]
    return out.to(weight.dtype)


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
