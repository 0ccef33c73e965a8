"""`tune`: measure launch settings for a model's layers on the card at hand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from hf_blr.experts import ExpertsLinear
from hf_blr.linear import BLRLinear, blr_modules
from hf_blr.ops.dispatch import resolve_impl
from hf_blr.ops.table import implementation_of
from hf_blr.structures import FACTOR


@torch.no_grad()
def tune(model: nn.Module, tokens: tuple[int, ...] = (1, 16, 1024)) -> Path:
    """Measure up to eight settings for each kind of kernel launch that the model's layers make, and keep the fastest.

    Nobody has to: without it, launches follow rules that were measured on an H100. It takes some seconds for each kind
    of layer and number of tokens. Later processes on the same kind of card read the results. Call it on a model in
    the form it will run in, after `fuse`.

    Args:
        model: holds BLR modules, on a GPU.
        tokens: numbers of rows to measure for; each stands for those down to the power of two below it.

    Returns:
        The file with the settings measured on this kind of card.

    Raises:
        ValueError: if no BLR module of the model runs on kernels.
    """
    modules = kinds_of(model, has_kernels)
    if not modules:
        raise ValueError(f"{type(model).__name__} has no BLR module on a GPU that the kernels support: nothing to tune")

    from hf_blr.ops.triton.tuned import file_of, tuning

    for module in modules:
        for count in tokens:
            with tuning():
                module(torch.randn(count, module.in_features, dtype=module.dtype, device=module.device))
    return file_of(modules[0].device)


def kinds_of(model: nn.Module, wanted: Callable[[BLRLinear], bool]) -> list[BLRLinear]:
    """Of the modules that are wanted, the first of each kind: of those alike, all launch the same."""
    found: dict[tuple, BLRLinear] = {}
    for module in blr_modules(model).values():
        if wanted(module):
            group = [module] if module.group is None else module.group[0].modules
            kind = (module.dtype, module.device, *((m.spec, m.storage, m.bias is None) for m in group))
            found.setdefault(kind, module)
    return list(found.values())


def has_kernels(module: BLRLinear) -> bool:
    """Whether kernels can run for this layer, where it is and in its dtype."""
    if isinstance(module, ExpertsLinear):
        # which rows an expert sees, nobody knows before
        return False
    tensors = module.tensors()
    factors = [tensors[name] for name in module.spec.names(FACTOR)]
    kernels = implementation_of(module.spec.structure).kernel is not None
    return resolve_impl(None, factors[0], factors, kernels=kernels) == "triton"
