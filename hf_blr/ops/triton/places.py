"""Layers in bits at few tokens by `decode_places`: the stages of one layer, or of several on one input."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor

from hf_blr.ops.rules.packed import padded
from hf_blr.ops.triton.bits import Weights
from hf_blr.ops.triton.decode_places import MOST_RANKS, multiply
from hf_blr.ops.triton.grouped import columns, joined, multiplied, split
from hf_blr.ops.triton.packed import read


def run(
    decode: Callable[..., Tensor],
    x: Tensor,
    tensors: list[Tensor],
    scales: list[Tensor],
    bits: list[int],
    lengths: list[int],
    biases: list[Tensor | None],
    activation: str,
    gated: bool,
) -> Tensor:
    """What `ops.places.define_places` says of its op, by a structure's function for layers side by side."""
    each = len(tensors) // len(biases)
    found = [w.stacked() for w in read(tensors, scales, bits, lengths)]
    by_name = [found[i::each] for i in range(each)]
    widths = [u.shape[1] for u in by_name[0]]
    if not len(x):
        return x.new_empty(0, widths[0] if gated else sum(widths))
    return decode(x, *by_name, biases, activation, gated)


def dense_in_places(x, ws: list[Weights], biases, activation: str, gated: bool) -> Tensor:
    """`[T, N]` of one layer's w `[1, N, K]`: a last stage without a first."""
    out = x.new_empty(len(x), ws[0].shape[1])
    multiply(x, ws[0].flat(), biases[0], out, activation)
    return out


def low_rank_in_places(x, us: list[Weights], vs: list[Weights], biases, activation: str, gated: bool) -> Tensor:
    """`[T, sum of N]` of u `[1, N, R]` and v `[1, R, K]` of each layer; gated, `[T, N]`."""
    both = range(len(us))
    if gated and split(both, (us, 0), (vs, 1), (biases, 0)) != [both]:
        return multiplied(low_rank_in_places(x, us, vs, biases, "", False), activation)
    out = x.new_empty(len(x), us[0].shape[1] if gated else sum(u.shape[1] for u in us))
    for part in split(both, (vs, 1)):
        for first in range(part.start, part.stop, MOST_RANKS):
            layers = range(first, min(first + MOST_RANKS, part.stop))
            lengths = [padded(vs[i].shape[1], vs[i].per) for i in layers]
            y, start = x.new_empty(len(x), sum(lengths)), 0
            multiply(x, joined(vs, layers, 1).flat(), None, y, ranks=[vs[i].shape[1] for i in layers])
            for run in split(layers, (us, 0), (biases, 0)):
                u, bias, o = joined(us, run, 0), joined(biases, run, 0), out if gated else columns(out, us, run)
                multiply(y[:, start:], u.flat(), bias, o, activation, 1 if gated else len(run), gated)
                start += sum(lengths[i - first] for i in run)
    return out


low_rank, dense = (partial(run, decode) for decode in (low_rank_in_places, dense_in_places))
