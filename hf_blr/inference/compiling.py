"""`compile_kernels`: what a model's first forwards would compile one after the other, side by side."""

from __future__ import annotations

import torch
from torch import nn

from hf_blr.experts import ExpertsLinear
from hf_blr.inference.tuning import kinds_of
from hf_blr.linear import BLRLinear
from hf_blr.ops.compiling import side_by_side


@torch.no_grad()
def compile_kernels(model: nn.Module, tokens: tuple[int, ...] = (1,)) -> int:
    """Compile the kernels that the model's layers run on for these numbers of rows.

    Nobody has to: first forwards compile what they need, half a second for each kernel. Triton keeps on disk what is
    compiled, for later processes. Call it on a model in the form it will run in, after `fuse`.

    Args:
        model: on any device. What is on no NVIDIA GPU is left out, and so are experts, of which nobody knows the rows.
        tokens: rows of a forward, over all of its texts.

    Returns:
        How many kinds of layers and numbers of rows were looked at; 0 also where Triton is older than 3.5.
    """
    todo = [(module, count) for module in kinds_of(model, on_gpu) for count in tokens]
    together = side_by_side() if todo else None
    if together is None:
        return 0
    with together:
        for module, count in todo:
            module(torch.zeros(count, module.in_features, dtype=module.dtype, device=module.device))
    return len(todo)


def on_gpu(module: BLRLinear) -> bool:
    return module.device.type == "cuda" and not isinstance(module, ExpertsLinear)
