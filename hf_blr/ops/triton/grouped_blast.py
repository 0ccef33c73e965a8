"""Grouped BLAST layers."""

from __future__ import annotations

from hf_blr.ops.rules.blast import blast_route
from hf_blr.ops.rules.device import device_of
from hf_blr.ops.triton.blast import blast_decode, blast_finish, blast_project
from hf_blr.ops.triton.decode_expand import decode_expand
from hf_blr.ops.triton.grouped import columns, finish_gated, gates, joined, multiplied, ranks, split


def forward(x, us, ss, vs, biases):
    """x `[T, K]` -> `[T, sum of N]`; each layer has u `[B2, Q, R]`, s `[B2, B1, R]`, v `[B1, R, P]` and bias."""
    out = x.new_empty(x.shape[0], sum(u.shape[0] * u.shape[1] for u in us))
    if not len(x):
        return out
    routes = [route_of(x, u, v, bias) for u, v, bias in zip(us, vs, biases, strict=True)]
    few, fused = routes[0].few, [route.fused for route in routes]
    # those that mix inside the last stage want y along the ranks: they have a first stage of their own
    for part in split(range(len(vs)), (vs, 1), (ss, 2), same=fused):
        v = joined(vs, part, 1)
        if few:
            z = blast_decode(x, joined(ss, part, 2), v, route_of(x, us[part.start], v, biases[part.start]))
        else:
            y = blast_project(x, v, routes[part.start].along_t)
        for run in split(part, (us, 0), (biases, 0)):
            u, bias, o = joined(us, run, 0), joined(biases, run, 0), columns(out, us, run)
            if few:
                decode_expand(ranks(z, vs, part, run), u, bias, o)
            else:
                blast_finish(ranks(y, vs, part, run), u, joined(ss, run, 2), bias, o, routes[run.start])
    return out


def gated(x, us, ss, vs, biases, activation):
    """x `[T, K]` -> activation(first) * second `[T, N]`, of two layers as in `forward`."""
    both = range(2)
    if not gates(us[0], len(x)) or split(both, (us, 0), (ss, 2), (vs, 1), (biases, 0)) != [both]:
        return multiplied(forward(x, us, ss, vs, biases), activation)
    v = joined(vs, both, 1)
    route = route_of(x, us[0], v, biases[0])
    if not route.few:
        return multiplied(forward(x, us, ss, vs, biases), activation)
    z = blast_decode(x, joined(ss, both, 2), v, route)
    return finish_gated(z, joined(us, both, 0), joined(biases, both, 0), activation)


def route_of(x, u, v, bias):
    """For u of one layer and v of one, or of all that share a first stage."""
    (b2, q, _), (b1, rows, p) = u.shape, v.shape
    return blast_route(x.shape[0], (b1, b2), (p, q, rows), device_of(x), bias is not None)
