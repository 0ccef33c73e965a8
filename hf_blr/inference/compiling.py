"""`compile_kernels`: what a model's first forwards would compile one after the other, side by side."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import nn

from hf_blr.inference.tuning import kinds_of
from hf_blr.linear import BLRLinear

#: compiling is C++ for the most part, which threads share no lock in; more of them wait for Python
THREADS = 16


def compile_kernels(model: nn.Module, tokens: tuple[int, ...] = (1,)) -> int:
    """Compile the kernels that the model's layers run on for these numbers of rows.

    Nobody has to: a first forward compiles what it needs, half a second for each kind of layer. Triton keeps on disk
    what is compiled, for later processes. Call it on a model in the form it will run in, after `fuse`.

    Args:
        model: on any device. What runs on no kernels is left out.
        tokens: rows of a forward, over all of its texts.

    Returns:
        The layers that were run, one of each kind for each number of rows.
    """
    todo = [(module, count) for module in kinds_of(model) for count in tokens]
    with ThreadPoolExecutor(min(THREADS, os.cpu_count() or 1)) as pool:
        for done in [pool.submit(run, module, count) for module, count in todo]:
            done.result()
    return len(todo)


# threads begin with gradients
@torch.no_grad()
def run(module: BLRLinear, count: int) -> None:
    """The layer on inputs of zeros."""
    module(torch.zeros(count, module.in_features, dtype=module.dtype, device=module.device))
