"""What the record of the Kronecker structure names."""

from __future__ import annotations

import torch

from hf_blr.linear import BLRLinear
from hf_blr.roofline.stage import Stage

from . import Kronecker


class KroneckerLinear(BLRLinear):
    spec_class = Kronecker

    def initial_std(self):
        return {"a": (3 * self.in_features * self.spec.rank) ** -0.5, "b": 1.0}


def kronecker_dense(a, b):
    blocks = torch.einsum("ijr,rqp->iqjp", a, b)
    return blocks.reshape(a.shape[0] * b.shape[1], -1)


def kronecker_linear(x, a, b, bias=None):
    y = torch.einsum("...jp,rqp->...jrq", x.unflatten(-1, (a.shape[1], b.shape[2])), b)
    out = torch.einsum("ijr,...jrq->...iq", a, y).flatten(-2)
    return out if bias is None else out + bias


def fits(in_features, a, b):
    return a.shape[2] == b.shape[0] and in_features == a.shape[1] * b.shape[2]


def fit(weight, spec, gram, options):
    """In closed form (Van Loan and Pitsianis 1993), in the Frobenius norm whatever the inputs are."""
    (b1, b2), (p, q), r = spec.num_blocks, spec.block_shape, spec.rank
    rows = weight.view(b2, q, b1, p).transpose(1, 2).reshape(b2 * b1, q * p)
    u, s, v = torch.linalg.svd(rows, full_matrices=False)
    count = min(r, len(s))
    a, b = weight.new_zeros(b2 * b1, r), weight.new_zeros(r, q * p)
    a[:, :count], b[:count] = u[:, :count] * s[:count].sqrt(), v[:count] * s[:count, None].sqrt()
    return {"a": a.view(b2, b1, r), "b": b.view(r, q, p)}, []


def finish(spec, tensors):
    return tensors


def forward_stages(spec, tokens, form, adds, layers, chip):
    (b1, b2), (p, q), t, r = spec.num_blocks, spec.block_shape, tokens, spec.rank
    y = t * b1 * r * q
    yield Stage("project", 2 * y * p, t * spec.in_features + r * q * p, (y,))
    yield Stage("mix", 2 * y * b2, b1 * b2 * r + t * spec.out_features, (y,))


def backward_stages(spec, tokens, chip):
    yield from forward_stages(spec, tokens, "pytorch", False, 1, chip)
    yield from forward_stages(spec, tokens, "pytorch", False, 1, chip)
