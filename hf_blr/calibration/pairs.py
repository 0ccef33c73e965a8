"""Pivoted layers as plain pairs of factors, for as long as gradient steps move them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from hf_blr.calibration.fisher import Statistics
from hf_blr.factorize import factorize
from hf_blr.factorize.pivots import pivoted
from hf_blr.linear import LowRankLinear, PivotedLinear
from hf_blr.ops.reference import DENSE
from hf_blr.structures import LowRank


def pivoted_layers(root: nn.Module) -> dict[str, PivotedLinear]:
    """{name below `root`: layer}."""
    return {name: module for name, module in root.named_modules() if isinstance(module, PivotedLinear)}


@contextmanager
def as_pairs(root: nn.Module, statistics: Statistics | None = None) -> Iterator[None]:
    """Inside the `with`, each pivoted layer below `root` is a low-rank one of the same matrix and rank.

    Gradient steps on u and c go astray: u carries what the pivots carry, features of very different size that depend on
    one another. Of all pairs (u A, A^-1 v) of one matrix, training gets that of its singular value decomposition in the
    metric of the statistics. There u^T G u and v H v^T are diagonal: to second order a step along one index of the rank
    does not disturb the others, which is what an optimizer that scales each number by itself takes for granted. At the
    end the matrix, then a different one, gets pivots anew. The layers that left come back, so what holds them stays
    valid.

    Args:
        root: a model or a part of one.
        statistics: of the pivoted layers, by their names below `root`; None takes the plain metric.
    """
    layers = pivoted_layers(root)
    pairs = {name: as_pair(name, module, statistics) for name, module in layers.items()}
    before = {name: pair.v.detach().clone() for name, pair in pairs.items()}
    for name, pair in pairs.items():
        root.set_submodule(name, pair)
    try:
        yield
    finally:
        for name, module in layers.items():
            pair = pairs[name]
            # a pair that stands where it stood needs no new pivots, which would round it once more
            if not torch.equal(pair.v, before[name]):
                for tensor, value in pivoted(pair.u.detach(), pair.v.detach()).items():
                    getattr(module, tensor).data.copy_(value)
            # a trainer may have thawed factors and frozen biases
            for factor in module.factors().values():
                factor.requires_grad_(pair.u.requires_grad)
            if module.bias is not None:
                module.bias.requires_grad_(pair.bias.requires_grad)
            root.set_submodule(name, module)


@torch.no_grad()
def as_pair(name: str, module: PivotedLinear, statistics: Statistics | None) -> LowRankLinear:
    """A low-rank layer of its own with the same matrix, rank, bias, dtype and device."""
    spec = LowRank(module.in_features, module.out_features, module.spec.rank)
    grams, output_grams = ({}, {}) if statistics is None else (statistics.grams, statistics.output_grams)
    wide = {key: factor.float() for key, factor in module.factors().items()}
    weight = DENSE["pivoted"](**wide, **module.indices())
    fitted = factorize(weight, spec, grams.get(name), output_gram=output_grams.get(name))
    factors = {key: factor.to(module.u.dtype) for key, factor in fitted.tensors.items()}
    pair = LowRankLinear.from_factors(spec, factors, module.bias, module.transposed)
    return pair.train(module.training).requires_grad_(module.u.requires_grad)
