"""Layers that share their input, as one registered op for each kind of kernels; without gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hf_blr.ops.activations import activated, check_activation
from hf_blr.ops.dispatch import compute_dtype, resolve_impl
from hf_blr.ops.library import contiguous_rows, define_op
from hf_blr.ops.table import Implementation, implementation_of
from hf_blr.structures import structure_named, structures
from hf_blr.structures.record import resolved

Factors = Sequence[tuple[Tensor, ...]]
Biases = Sequence[Tensor | None]


def grouped_linear(
    structure: str, x: Tensor, factors: Factors, biases: Biases | None = None, impl: str | None = None
) -> tuple[Tensor, ...]:
    """The outputs of several layers of one structure, with the same block counts, on one input.

    Faster than one layer after the other where kernels run and the factors are packed (`hf_blr.fuse`); the same
    function in any case.

    Args:
        structure: one whose record names grouped kernels.
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
    found, by_name = implementation_of(structure), checked(factors, biases)
    if not runs_kernels(impl, found, x, by_name):
        return tuple(found.linear(x, *tensors) for tensors in zip(*by_name, strict=True))
    out = call(ops_of(structure).forward, x, by_name)
    return out.split([width(u) for u, *_ in factors], dim=-1)


def gated_linear(
    structure: str,
    x: Tensor,
    factors: Factors,
    biases: Biases | None = None,
    activation: str = "silu",
    impl: str | None = None,
) -> Tensor:
    """activation(gate(x)) * up(x), the product that a gated MLP takes down (arXiv 2002.05202).

    At one token, where launches count, both layers have one last stage, which stores the product alone, without a
    gradient. At many tokens one kernel for both was no faster than two and the product (H100).

    Args:
        structure, x, impl: as in `grouped_linear`, like what is raised.
        factors, biases: of the gate and of the other layer, of the same shapes.
        activation: of `activations.ACTIVATIONS`.

    Returns:
        `[..., N]` in x's dtype.
    """
    check_activation(activation)
    if x.numel() == x.shape[-1]:
        by_name = checked(factors, biases)
        if runs_kernels(impl, implementation_of(structure), x, by_name):
            return call(ops_of(structure).gated, x, by_name, activation)
    gate, up = grouped_linear(structure, x, factors, biases, impl)
    return activated(up, activation, gate)


class GroupedOps(NamedTuple):
    """The registered ops of one kind of grouped kernels."""

    forward: Any
    gated: Any


_ops: dict[str, GroupedOps] = {}


def ops_of(structure: str) -> GroupedOps:
    """The ops of a structure's grouped kernels, which other structures may share."""
    found = _ops.get(structure)
    return define_grouped(structure) if found is None else found


def define_grouped(structure: str) -> GroupedOps:
    """Register the ops behind a record's `grouped`: `<module's name>` and `<module's name>_gated`."""
    record = structure_named(structure)
    name = record.grouped.rpartition(".")[2]
    tensors = "".join(f", Tensor[] {t}" for t in record.spec.names())

    def forward(*args: Any) -> Tensor:
        return resolved(record.grouped).forward(*args)

    def gated(*args: Any) -> Tensor:
        return resolved(record.grouped).gated(*args)

    def forward_fake(x: Tensor, us: list[Tensor], *_: Any) -> Tensor:
        return x.new_empty(x.shape[0], sum(width(u) for u in us))

    def gated_fake(x: Tensor, us: list[Tensor], *_: Any) -> Tensor:
        return x.new_empty(x.shape[0], width(us[0]))

    define_op(f"{name}(Tensor x{tensors}, Tensor?[] bias) -> Tensor", forward, forward_fake)
    define_op(f"{name}_gated(Tensor x{tensors}, Tensor?[] bias, str activation) -> Tensor", gated, gated_fake)
    _ops[structure] = GroupedOps(getattr(torch.ops.hf_blr, name), getattr(torch.ops.hf_blr, f"{name}_gated"))
    return _ops[structure]


def checked(factors: Factors, biases: Biases | None) -> list[list[Tensor | None]]:
    """By name: all u, (all s,) all v, all biases. Raises ValueError where they cannot run together."""
    biases = [None] * len(factors) if biases is None else biases
    counts = {(u.shape[:-2], v.shape[:-2]) for u, *_, v in factors}
    if len(counts) > 1 or len({b is None for b in biases}) > 1:
        raise ValueError("layers that run together need the same block counts, and either all or none a bias")
    return [*map(list, zip(*factors, strict=True)), list(biases)]


def runs_kernels(impl: str | None, found: Implementation, x: Tensor, by_name: list[list[Tensor | None]]) -> bool:
    tensors = [t for tensors in by_name for t in tensors]
    return resolve_impl(impl, x, tensors, structure=found.name, kernels=found.grouped) == "triton"


def call(op: Any, x: Tensor, by_name: list[list[Tensor | None]], *settings: Any) -> Tensor:
    """The op `[..., N]` on rows that it can read."""
    dtype = compute_dtype(x)
    rows = contiguous_rows(x.reshape(-1, x.shape[-1]), dtype)
    tensors = [[None if t is None else contiguous_rows(t, dtype) for t in named] for named in by_name]
    out = op(rows, *tensors, *settings)
    return out.view(*x.shape[:-1], out.shape[-1])


def width(u: Tensor) -> int:
    """N, of a factor `[N, R]` or `[B2, Q, R]`."""
    return u.shape[:-1].numel()


for _name in structures():
    if structure_named(_name).grouped:
        define_grouped(_name)
