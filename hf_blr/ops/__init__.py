"""Functional form of the structures: `linear` for any of them, `low_rank_linear` and so on by name.

`grouped_linear` runs several layers of one structure on one input, `gated_linear` the two of a gated MLP. Each runs
hand-written kernels or plain PyTorch, as `impl` says: "auto" (the default, a rule in `dispatch`), "triton",
"reference" or "dense". `use_impl` sets it for a block of code, and `impl` of a module for that module.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from hf_blr.ops.activations import activated, check_activation
from hf_blr.ops.bits import InBits, linear_in_bits, route_in_bits
from hf_blr.ops.dispatch import current_impl, few_tokens, resolve_impl, use_impl
from hf_blr.ops.experts import Routed, gathered_rows, route_rows
from hf_blr.ops.float8_training import linear_in_float8, linears_in_float8
from hf_blr.ops.grouped import gated_linear, grouped_linear
from hf_blr.ops.grouped_bits import gated_in_bits, grouped_float8, grouped_in_bits
from hf_blr.ops.numbers import numbers_in_bits
from hf_blr.ops.table import implementation_of, multiplied_out
from hf_blr.structures import structures

__all__ = [
    "InBits",
    "Routed",
    "current_impl",
    "few_tokens",
    "gated_in_bits",
    "gated_linear",
    "gathered_rows",
    "grouped_float8",
    "grouped_in_bits",
    "grouped_linear",
    "implementation_of",
    "linear",
    "linear_in_bits",
    "linear_in_float8",
    "linears_in_float8",
    "numbers_in_bits",
    "route_in_bits",
    "route_rows",
    "use_impl",
]


def linear(
    structure: str,
    x: Tensor,
    tensors: Sequence[Tensor],
    bias: Tensor | None = None,
    impl: str | None = None,
    activation: str = "",
) -> Tensor:
    """activation(x W^T + bias), with W given by the tensors of a structure.

    Args:
        structure: its name.
        x: `[..., K]`.
        tensors: factors and indices in the order of the structure's `kinds`: (u, v), (u, s, v), ...
        bias: `[N]`, or none.
        impl: "auto", "triton", "reference", "dense", or None for what `use_impl` set.
        activation: of `activations.ACTIVATIONS`, applied by the last stage before it stores; "" for none.

    Returns:
        `[..., N]` in x's dtype, accumulated in float32.

    Raises:
        ValueError: if the shapes do not fit each other, or for an unknown structure or activation.
        RuntimeError: if "triton" was asked for and cannot run here.
    """
    found = implementation_of(structure)
    if not found.fits(x.shape[-1], *tensors):
        shapes = [tuple(t.shape) for t in tensors]
        raise ValueError(
            f"x of shape {tuple(x.shape)} and {structure} tensors of shapes {shapes} do not fit each other"
        )
    check_activation(activation)
    # an activation in the last stage saves a pass over the output, for which cuBLAS has no match
    pays = None if activation else found.pays
    impl = resolve_impl(
        impl,
        x,
        (*tensors[: found.factors], bias),
        indices=tensors[found.factors :],
        structure=structure,
        kernels=found.kernel is not None,
        pays=pays,
    )
    if impl == "triton" and found.kernel is not None:
        return found.kernel(x, tensors, bias, activation)
    if impl == "dense":
        return activated(F.linear(x, multiplied_out(found, tensors), bias), activation)
    return activated(found.linear(x, *tensors, bias), activation)


def __getattr__(name: str) -> Callable[..., Tensor]:
    structure = name.removesuffix("_linear")
    if structure == name or structure not in structures():
        raise AttributeError(f"module 'hf_blr.ops' has no attribute {name!r}")
    return linear_of(structure)


@cache
def linear_of(structure: str) -> Callable[..., Tensor]:
    """`linear` of one structure, with its tensors by position or name: `blast_linear(x, u, s, v, bias=None)`."""
    names = structures()[structure].spec.names()

    def function(
        x: Tensor, *given: Tensor | None, impl: str | None = None, activation: str = "", **named: Tensor
    ) -> Tensor:
        arguments: dict[str, Any] = dict(zip((*names, "bias"), given, strict=False)) | named
        bias = arguments.pop("bias", None)
        if set(arguments) != set(names) or len(given) > len(names) + 1:
            raise TypeError(f"{structure}_linear takes x, {', '.join(names)} and bias, got {len(given)} and {[*named]}")
        return linear(structure, x, [arguments[n] for n in names], bias, impl, activation)

    function.__name__ = function.__qualname__ = f"{structure}_linear"
    function.__doc__ = f"`linear` of {structure}: (x, {', '.join(names)}, bias=None, *, impl=None, activation='')."
    return function
