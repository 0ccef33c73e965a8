"""Whole matrices in few bits as torchao makes them: no text, no rotation, its own scales."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from hf_blr.bench.rival_layers import bytes_of
from hf_blr.bench.rivals import GROUP, needed
from hf_blr.targets import find_targets

#: how torchao's int4 finds scales and zeros: of the smallest and largest number of a group, or by half-quadratic steps
INT4_SCALES = ("tinygemm", "hqq")


def torchao_config(name: str, scales: str = INT4_SCALES[0]) -> Any:
    """torchao's settings for this format of ours: int8 and fp8 with a scale a row, int4 with one for `GROUP` numbers.

    int4 is in the layout of PyTorch's own kernel, which needs a GPU to be made.
    """
    quantization = needed("torchao.quantization")
    own: dict[str, Any] = {"set_inductor_config": False}
    if name == "int4":
        own |= {
            "group_size": GROUP,
            "int4_packing_format": "tile_packed_to_4d",
            "int4_choose_qparams_algorithm": scales,
        }
        return quantization.Int4WeightOnlyConfig(**own)
    kinds = {"int8": quantization.Int8WeightOnlyConfig, "fp8": quantization.Float8WeightOnlyConfig}
    return kinds[name](granularity=quantization.PerRow(), **own)


@torch.no_grad()
def torchao_weights(dense: nn.Module, name: str, **settings: Any) -> tuple[nn.Module, int]:
    """A copy whose projections hold what torchao's multiply by, and the bytes that torchao's take.

    torchao is given the weights in bfloat16, which its int4 asks for; what it multiplies by is what it makes of the
    identity, in bfloat16 too.
    """
    model, stored = copy.deepcopy(dense), 0
    config, quantize = torchao_config(name, **settings), needed("torchao.quantization").quantize_
    for target in find_targets(model):
        weight: Any = model.get_submodule(target).weight
        n, k = weight.shape
        layer: Any = nn.Sequential(nn.Linear(k, n, bias=False, device=weight.device, dtype=torch.bfloat16))
        layer[0].weight.copy_(weight)
        quantize(layer, config)
        # of int4 a code, and a scale and a zero for each group: its layout pads small rows to nearly twice their size
        stored += (n * k // 2 + 4 * n * k // GROUP) if name == "int4" else bytes_of(layer[0].weight)
        weight.copy_(layer(torch.eye(k, device=weight.device, dtype=torch.bfloat16)).mT)
    return model, stored
