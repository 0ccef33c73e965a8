"""Grouped Monarch and low-rank layers: low-rank is Monarch with one block."""

from __future__ import annotations

import torch

from hf_blr.ops.rules.device import device_of
from hf_blr.ops.rules.low_rank import kernels_pay
from hf_blr.ops.rules.monarch import monarch_route
from hf_blr.ops.triton.bits import Weights
from hf_blr.ops.triton.decode_expand import decode_expand
from hf_blr.ops.triton.grouped import columns, finish_gated, gates, joined, multiplied, ranks, split
from hf_blr.ops.triton.monarch import monarch_decode, monarch_finish


def forward(x, us, vs, biases):
    """x `[T, K]` -> `[T, sum of N]`; each layer has u `[B2, Q, B1*r]`, v `[B1, B2*r, P]` and bias `[N]` or None.

    Layers of one size make one Monarch layer with the output blocks of all.
    """
    us, vs = stacked(us), stacked(vs)
    tokens, (b1, _, p) = x.shape[0], vs[0].shape
    out = x.new_empty(tokens, sum(u.shape[0] * u.shape[1] for u in us))
    if tokens == 0:
        return out
    for part in split(range(len(vs)), (vs, 1)):
        v = joined(vs, part, 1)
        # low-rank: the same exception from the kernels for few tokens as in its own rule
        few = route_of(x, us, vs, biases, part).few and (b1 > 1 or kernels_pay(tokens) or isinstance(v, Weights))
        if not few:
            y = torch.bmm(x.view(tokens, b1, p).transpose(0, 1), v.transpose(1, 2))
        elif b1 == 1:
            z = monarch_decode(x, v, 1, route_of(x, us, vs, biases, part))
        for run in split(part, (us, 0), (biases, 0)):
            route = route_of(x, us, vs, biases, run, keep=not few)
            u, bias, o = joined(us, run, 0), joined(biases, run, 0), columns(out, us, run)
            if not few:
                monarch_finish(ranks(y, vs, part, run), u, bias, o, route)
            elif b1 == 1:
                decode_expand(ranks(z, vs, part, run), u, bias, o, beside=run.start > part.start)
            else:
                decode_expand(monarch_decode(x, joined(vs, run, 1), u.shape[0], route), u, bias, o)
    return out


def gated(x, us, vs, biases, activation):
    """x `[T, K]` -> activation(first) * second `[T, N]`, of two layers as in `forward`."""
    us, vs = stacked(us), stacked(vs)
    both, b1 = range(2), vs[0].shape[0]
    route = route_of(x, us, vs, biases, both)
    if not (route.few and gates(us[0], len(x))) or split(both, (us, 0), (vs, 1), (biases, 0)) != [both]:
        return multiplied(forward(x, us, vs, biases), activation)
    u = joined(us, both, 0)
    z = monarch_decode(x, joined(vs, both, 1), 1 if b1 == 1 else u.shape[0], route)
    return finish_gated(z, u, joined(biases, both, 0), activation)


def route_of(x, us, vs, biases, layers: range, keep=False):
    """Of these layers, which are of one size where that matters; `keep` as in `monarch_route`."""
    (b2, q, _), (b1, rows, p) = us[layers.start].shape, vs[layers.start].shape
    adds = biases[layers.start] is not None
    return monarch_route(x.shape[0], (b1, b2), (p, q, rows // b2), device_of(x), adds, keep, len(layers))


def stacked(tensors):
    """Low-rank's factors as stacks of one block."""
    return [t if len(t.shape) == 3 else t.stacked() if isinstance(t, Weights) else t[None] for t in tensors]
