"""Pivoted layers as plain pairs of factors, for as long as gradient steps move them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from hf_blr.factorize.pivots import pivoted
from hf_blr.linear import LowRankLinear, PivotedLinear
from hf_blr.structures import LowRank


@contextmanager
def as_pairs(root: nn.Module) -> Iterator[None]:
    """Inside the `with`, each pivoted layer below `root` is a low-rank one of the same matrix and rank.

    Gradient steps on u and c go astray: u carries what the pivots carry, features of very different size that depend on
    one another, where both factors of a pair can be orthogonal up to their sizes. At the end the matrix, then a
    different one, gets pivots anew. The layers that left come back, so what holds them stays valid.
    """
    layers = [(name, module) for name, module in root.named_modules() if isinstance(module, PivotedLinear)]
    pairs = {name: as_pair(module) for name, module in layers}
    before = {name: pair.v.detach().clone() for name, pair in pairs.items()}
    for name, pair in pairs.items():
        root.set_submodule(name, pair)
    try:
        yield
    finally:
        for name, module in layers:
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


def as_pair(module: PivotedLinear) -> LowRankLinear:
    """A low-rank layer of its own with the same matrix, rank, bias, dtype and device."""
    spec = module.spec
    u, v = svd_pair(module.u.detach(), identity_and(module.c.detach(), module.order))
    factors = {"u": u.to(module.u.dtype), "v": v.to(module.u.dtype)}
    plain = LowRank(spec.in_features, spec.out_features, spec.rank)
    pair = LowRankLinear.from_factors(plain, factors, module.bias, module.transposed)
    return pair.train(module.training).requires_grad_(module.u.requires_grad)


def identity_and(c: Tensor, order: Tensor) -> Tensor:
    """v `[R, K]` = [I c] with its columns where the features stand."""
    v = c.new_empty(len(c), len(order))
    v[:, order.long()] = torch.cat([torch.eye(len(c), dtype=c.dtype, device=c.device), c], 1)
    return v


def svd_pair(u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """The same u v, from its singular value decomposition, with half of each singular value on either side."""
    left, a = torch.linalg.qr(u.double())
    right, b = torch.linalg.qr(v.double().mT)
    x, sizes, y = torch.linalg.svd(a @ b.mT)
    root = sizes.sqrt()
    return left @ (x * root), (y * root[:, None]) @ right.mT
