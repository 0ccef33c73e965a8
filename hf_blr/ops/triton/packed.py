"""Layers whose factors are kept in bits, at few tokens: the kernels of plain layers, which read codes and scales."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor

from hf_blr.ops.triton import blast as blast_kernels
from hf_blr.ops.triton import low_rank as low_rank_kernels
from hf_blr.ops.triton import monarch as monarch_kernels
from hf_blr.ops.triton import pivoted as pivoted_kernels
from hf_blr.ops.triton.bits import Weights, weights_in_bits
from hf_blr.ops.triton.decode_expand import decode_expand


def run(
    decode: Callable[..., Tensor],
    x: Tensor,
    tensors: list[Tensor],
    scales: list[Tensor | None],
    bits: list[int],
    lengths: list[int],
    bias: Tensor | None,
    activation: str,
) -> Tensor:
    """What `ops.bits_library.define_packed` says of its op, by a structure's function for few tokens."""
    if not len(x):
        return x.new_empty(0, tensors[0].shape[:-1].numel())
    return decode(x, *read(tensors, scales, bits, lengths), bias, activation)


def run_grouped(kernels, x, tensors, scales, bits, lengths, biases, activation: str, gated: bool) -> Tensor:
    """What `ops.grouped_bits.define_grouped_packed` says of its op, by a module of grouped kernels."""
    found, each = read(tensors, scales, bits, lengths), len(tensors) // len(biases)
    by_name = [found[i::each] for i in range(each)]
    if gated:
        return kernels.gated(x, *by_name, biases, activation)
    return kernels.forward(x, *by_name, biases)


def read(tensors, scales, bits, lengths) -> list[Tensor | Weights]:
    """Factors in bits as `Weights`, what has no scale as it is."""
    return [
        t if scale is None else weights_in_bits(t, scale, b, length)
        for t, scale, b, length in zip(tensors, scales, bits, lengths, strict=True)
    ]


def dense_decode(x: Tensor, w: Weights, bias: Tensor | None, activation: str) -> Tensor:
    """`[T, N]` from x `[T, K]` and w `[N, K]`: a last stage without a first."""
    out = x.new_empty(len(x), w.shape[0])
    decode_expand(x[None], w.stacked(), bias, out, activation)
    return out


def blast_decode(x: Tensor, u: Weights, s: Tensor, v: Weights, bias: Tensor | None, activation: str) -> Tensor:
    return blast_kernels.forward(x, u, s, v, bias, activation=activation)[0]


def monarch_decode(x: Tensor, u: Weights, v: Weights, bias: Tensor | None, activation: str) -> Tensor:
    return monarch_kernels.forward(x, u, v, bias, activation=activation)[0]


blast, monarch, dense = (partial(run, decode) for decode in (blast_decode, monarch_decode, dense_decode))
low_rank, pivoted = partial(run, low_rank_kernels.decode), partial(run, pivoted_kernels.decode)
