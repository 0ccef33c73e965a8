"""Pivoted layers as plain pairs of factors, for as long as gradient steps move them.

Gradient steps on u and c go astray: u carries what the pivots carry, features of very different size that depend on one
another. Of all pairs (u A, A^-1 v) of one matrix, training gets that of its singular value decomposition in the metric
of the statistics. There u^T G u and v H v^T are diagonal: to second order a step along one index of the rank does not
disturb the others, which is what an optimizer that scales each number by itself takes for granted. At the end the
matrix, then a different one, gets pivots anew.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hf_blr.factorize import factorize
from hf_blr.linear import BLRLinear
from hf_blr.structures.low_rank import LowRank
from hf_blr.structures.pivoted.pivots import pivoted
from hf_blr.structures.pivoted.reference import pivoted_dense


class Pair(NamedTuple):
    """A low-rank layer in the place of a pivoted one, and its v as it was at first."""

    layer: BLRLinear
    first_v: Tensor


@torch.no_grad()
def opened(module: BLRLinear, gram: Tensor | None, output_gram: Tensor | None) -> Pair:
    """A low-rank layer of its own with the same matrix, rank, bias, dtype and device."""
    spec = LowRank(module.in_features, module.out_features, module.spec.rank)
    wide = {name: factor.float() for name, factor in module.factors().items()}
    fitted = factorize(pivoted_dense(**wide, **module.indices()), spec, gram, output_gram)
    layer = BLRLinear.from_fit(spec, fitted.tensors, module)
    layer.requires_grad_(module.u.requires_grad)
    return Pair(layer, layer.v.detach().clone())


def closed(module: BLRLinear, pair: Pair) -> None:
    """The pair's matrix back into the layer that it stood in for, with pivots of its own."""
    u, v = pair.layer.u.detach(), pair.layer.v.detach()
    # a pair that stands where it stood needs no new pivots, which would round it once more
    if not torch.equal(v, pair.first_v):
        for name, value in pivoted(u, v).items():
            getattr(module, name).data.copy_(value)
    # a trainer may have thawed factors and frozen biases
    for factor in module.factors().values():
        factor.requires_grad_(pair.layer.u.requires_grad)
    if module.bias is not None and pair.layer.bias is not None:
        module.bias.requires_grad_(pair.layer.bias.requires_grad)
