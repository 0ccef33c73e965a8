"""Layers whose factors are kept in bits, at few tokens: the kernels of plain layers, which read codes and scales."""

from __future__ import annotations

from collections.abc import Callable

import torch

from hf_blr.ops.triton import blast, low_rank, monarch, pivoted
from hf_blr.ops.triton.bits import Weights
from hf_blr.ops.triton.decode_expand import decode_expand


def read(tensor, scale, bits: int, length: int):
    """A layer's tensor as kernels take it: in bits as `Weights`, else as it is."""
    if scale is None:
        return tensor
    if tensor.dtype == torch.float8_e4m3fn:
        return Weights(tensor.view(torch.int32), scale, "fp8", length)
    return Weights(tensor, scale, f"int{bits}", length)


def of(decode: Callable) -> Callable:
    """The op `hf_blr::<name>_packed`, as `ops.bits.define_packed` says, by a structure's kernels for few tokens."""

    def forward(x, tensors, scales, bits, lengths, bias, activation):
        if not len(x):
            return x.new_empty(0, tensors[0].shape[:-1].numel())
        return decode(x, *map(read, tensors, scales, bits, lengths), bias, activation)

    return forward


def dense_decode(x, w: Weights, bias, activation=""):
    """`[T, N]` from x `[T, K]` and w `[N, K]`: a last stage without a first."""
    out = x.new_empty(len(x), w.shape[0])
    decode_expand(x[None], w.stacked(), bias, out, activation)
    return out


#: {structure: (x, tensors, bias, activation) -> out}
DECODE = {
    "blast": blast.decode,
    "dense": dense_decode,
    "low_rank": low_rank.decode,
    "monarch": monarch.decode,
    "pivoted": pivoted.decode,
}
