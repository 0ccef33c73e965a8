"""Layers that share their input, as one registered op per structure; without gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_blr.ops import reference
from hf_blr.ops.dispatch import compute_dtype, resolve_impl
from hf_blr.ops.library import contiguous_rows, define_ops

REFERENCE = {
    "low_rank": reference.low_rank_linear,
    "monarch": reference.monarch_linear,
    "blast": reference.blast_linear,
}


def siblings_linear(
    structure: str,
    x: Tensor,
    factors: list[tuple[Tensor, ...]],
    biases: list[Tensor | None] | None = None,
    impl: str | None = None,
) -> tuple[Tensor, ...]:
    """The outputs of several layers of one structure, with the same block counts, on one input.

    Faster than one layer after the other where kernels run and the factors are packed (`hf_blr.fuse`); the same
    function in any case.

    Args:
        structure: "low_rank", "monarch" or "blast".
        x: `[..., K]`.
        factors: for each layer (u, v) or (u, s, v), shaped as the single layer's op takes them.
        biases: for each layer `[N]`, or none at all.
        impl: "auto", "triton", "reference", or None for what `use_impl` set.

    Returns:
        For each layer `[..., N]` in x's dtype. The kernels' results are parts of one buffer, without a gradient.

    Raises:
        ValueError: if the block counts differ, or only some have a bias.
        RuntimeError: if "triton" was asked for and cannot run here.
    """
    biases = [None] * len(factors) if biases is None else biases
    counts = {(u.shape[:-2], v.shape[:-2]) for u, *_, v in factors}
    if len(counts) > 1 or len({b is None for b in biases}) > 1:
        raise ValueError("layers that run together need the same block counts, and either all or none a bias")
    # by name: all u, (all s,) all v, all biases
    by_name = [*zip(*factors, strict=True), biases]
    if resolve_impl(impl, "siblings", x, *(t for tensors in by_name for t in tensors)) != "triton":
        return tuple(REFERENCE[structure](x, *f, b) for f, b in zip(factors, biases, strict=True))
    dtype = compute_dtype(x)
    rows = contiguous_rows(x.reshape(-1, x.shape[-1]), dtype)
    by_name = [[None if t is None else contiguous_rows(t, dtype) for t in tensors] for tensors in by_name]
    op = torch.ops.hf_blr.blast_siblings if structure == "blast" else torch.ops.hf_blr.monarch_siblings
    out = op(rows, *by_name)
    out = out.view(*x.shape[:-1], out.shape[-1])
    return out.split([width(u) for u, *_ in factors], dim=-1)


def width(u: Tensor) -> int:
    """N, of a factor `[N, R]` or `[B2, Q, R]`."""
    return u.shape[:-1].numel()


def _fake(x, us, *_):
    return x.new_empty(x.shape[0], sum(width(u) for u in us))


def _monarch_siblings(x, u, v, bias):
    from hf_blr.ops.triton.siblings import monarch_siblings_fwd

    # low-rank is Monarch with one block
    u, v = ([t if t.dim() == 3 else t[None] for t in ts] for ts in (u, v))
    return monarch_siblings_fwd(x, u, v, bias)


def _blast_siblings(x, u, s, v, bias):
    from hf_blr.ops.triton.siblings import blast_siblings_fwd

    return blast_siblings_fwd(x, u, s, v, bias)


_OPS = {
    "monarch_siblings(Tensor x, Tensor[] u, Tensor[] v, Tensor?[] bias) -> Tensor": (_monarch_siblings, _fake),
    "blast_siblings(Tensor x, Tensor[] u, Tensor[] s, Tensor[] v, Tensor?[] bias) -> Tensor": (_blast_siblings, _fake),
}

define_ops(_OPS)
