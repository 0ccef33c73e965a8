"""Dense layers in four bits, what every structure is measured against at equal bytes.

Perplexities are those of GPTQ (arXiv 2210.17323) on weights rotated by a random orthogonal matrix: rotated, they lie on
no grid of the 4-bit file that the small model comes from, and outliers are spread.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from hf_blr.bench.rivals import GROUP, quantised
from hf_blr.targets import find_targets

#: of a weight: four, and a scale and a zero of 16 bits for each group
BITS = 4 + 32 / GROUP


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
