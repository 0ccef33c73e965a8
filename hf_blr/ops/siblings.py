"""Layers that share their input, as one registered op per structure; without gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_blr.ops import reference
from hf_blr.ops.activations import activated, check_activation
from hf_blr.ops.dispatch import compute_dtype, resolve_impl
from hf_blr.ops.library import contiguous_rows, define_ops

#: {structure: whose ops it runs}; low-rank is Monarch with one block
NAMES = {"low_rank": "monarch", "monarch": "monarch", "blast": "blast"}


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
    by_name = checked(factors, biases)
    if not runs_kernels(impl, x, by_name):
        return tuple(reference.LINEAR[structure](x, *tensors) for tensors in zip(*by_name, strict=True))
    out = call(f"{NAMES[structure]}_siblings", x, by_name)
    return out.split([width(u) for u, *_ in factors], dim=-1)


def gated_linear(
    structure: str,
    x: Tensor,
    factors: list[tuple[Tensor, ...]],
    biases: list[Tensor | None] | None = None,
    activation: str = "silu",
    impl: str | None = None,
) -> Tensor:
    """activation(gate(x)) * up(x), the product that a gated MLP takes down (arXiv 2002.05202).

    At one token, where launches count, both layers have one last stage, which stores the product alone, without a
    gradient. At many tokens one kernel for both was no faster than two and the product (H100).

    Args:
        structure, x, impl: as in `siblings_linear`, like what is raised.
        factors, biases: of the gate and of the other layer, of the same shapes.
        activation: of `activations.ACTIVATIONS`.

    Returns:
        `[..., N]` in x's dtype.
    """
    check_activation(activation)
    if x.numel() == x.shape[-1]:
        by_name = checked(factors, biases)
        if runs_kernels(impl, x, by_name):
            return call(f"{NAMES[structure]}_gated", x, by_name, activation)
    gate, up = siblings_linear(structure, x, factors, biases, impl)
    return activated(up, activation, gate)


def checked(factors, biases) -> list[list[Tensor | None]]:
    """By name: all u, (all s,) all v, all biases. Raises ValueError where they cannot run together."""
    biases = [None] * len(factors) if biases is None else biases
    counts = {(u.shape[:-2], v.shape[:-2]) for u, *_, v in factors}
    if len(counts) > 1 or len({b is None for b in biases}) > 1:
        raise ValueError("layers that run together need the same block counts, and either all or none a bias")
    return [*map(list, zip(*factors, strict=True)), list(biases)]


def runs_kernels(impl: str | None, x: Tensor, by_name) -> bool:
    return resolve_impl(impl, "siblings", x, *(t for tensors in by_name for t in tensors)) == "triton"


def call(name: str, x: Tensor, by_name, *settings) -> Tensor:
    """The op of that name, `[..., N]`, on rows that it can read."""
    dtype = compute_dtype(x)
    rows = contiguous_rows(x.reshape(-1, x.shape[-1]), dtype)
    by_name = [[None if t is None else contiguous_rows(t, dtype) for t in tensors] for tensors in by_name]
    out = getattr(torch.ops.hf_blr, name)(rows, *by_name, *settings)
    return out.view(*x.shape[:-1], out.shape[-1])


def width(u: Tensor) -> int:
    """N, of a factor `[N, R]` or `[B2, Q, R]`."""
    return u.shape[:-1].numel()


def _fake(x, us, *_):
    return x.new_empty(x.shape[0], sum(width(u) for u in us))


def _gated_fake(x, us, *_):
    return x.new_empty(x.shape[0], width(us[0]))


def _monarch_siblings(x, u, v, bias):
    from hf_blr.ops.triton.siblings import monarch_siblings_fwd

    return monarch_siblings_fwd(x, stacked(u), stacked(v), bias)


def _monarch_gated(x, u, v, bias, activation):
    from hf_blr.ops.triton.siblings import monarch_gated_fwd

    return monarch_gated_fwd(x, stacked(u), stacked(v), bias, activation)


def stacked(tensors: list[Tensor]) -> list[Tensor]:
    """Low-rank's factors as stacks of one block."""
    return [t if t.dim() == 3 else t[None] for t in tensors]


def _blast_siblings(x, u, s, v, bias):
    from hf_blr.ops.triton.siblings import blast_siblings_fwd

    return blast_siblings_fwd(x, u, s, v, bias)


def _blast_gated(x, u, s, v, bias, activation):
    from hf_blr.ops.triton.siblings import blast_gated_fwd

    return blast_gated_fwd(x, u, s, v, bias, activation)


_UV, _USV = "Tensor x, Tensor[] u, Tensor[] v", "Tensor x, Tensor[] u, Tensor[] s, Tensor[] v"
_OPS = {
    f"monarch_siblings({_UV}, Tensor?[] bias) -> Tensor": (_monarch_siblings, _fake),
    f"blast_siblings({_USV}, Tensor?[] bias) -> Tensor": (_blast_siblings, _fake),
    f"monarch_gated({_UV}, Tensor?[] bias, str activation) -> Tensor": (_monarch_gated, _gated_fake),
    f"blast_gated({_USV}, Tensor?[] bias, str activation) -> Tensor": (_blast_gated, _gated_fake),
}

define_ops(_OPS)
