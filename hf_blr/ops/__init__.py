"""Functional form of the structures: `low_rank_linear`, `pivoted_linear`, `monarch_linear`, `blast_linear`.

`siblings_linear` runs several layers of one structure on one input, `gated_linear` the two of a gated MLP. Each runs
hand-written kernels or plain PyTorch, as `impl` says: "auto" (the default, a rule in `dispatch`), "triton",
"reference" or "dense". `use_impl` sets it for a block of code, and `impl` of a module for that module.
"""

from __future__ import annotations

from torch import Tensor

from hf_blr.ops import library, reference
from hf_blr.ops.activations import activated, check_activation
from hf_blr.ops.dispatch import current_impl, few_tokens, resolve_impl, use_impl
from hf_blr.ops.siblings import gated_linear, siblings_linear

__all__ = [
    "blast_linear",
    "current_impl",
    "few_tokens",
    "gated_linear",
    "low_rank_linear",
    "monarch_linear",
    "pivoted_linear",
    "siblings_linear",
    "use_impl",
]


def low_rank_linear(
    x: Tensor, u: Tensor, v: Tensor, bias: Tensor | None = None, impl: str | None = None, activation: str = ""
) -> Tensor:
    """activation(x v^T u^T + bias).

    Args:
        x: `[..., K]`.
        u, v: `[N, R]` and `[R, K]`.
        bias: `[N]`, or none.
        impl: "auto", "triton", "reference", "dense", or None for what `use_impl` set.
        activation: of `activations.ACTIVATIONS`, applied by the last stage before it stores; "" for none.

    Returns:
        `[..., N]` in x's dtype, accumulated in float32.

    Raises:
        ValueError: if the shapes do not fit each other, or for an unknown activation.
        RuntimeError: if "triton" was asked for and cannot run here.
    """
    check_shapes(x, x.shape[-1] == v.shape[-1] and u.shape[-1] == v.shape[0], u=u, v=v)
    return run("low_rank", x, bias, impl, activation, u=u, v=v)


def pivoted_linear(
    x: Tensor,
    u: Tensor,
    c: Tensor,
    order: Tensor,
    bias: Tensor | None = None,
    impl: str | None = None,
    activation: str = "",
) -> Tensor:
    """(x[order[:R]] + c x[order[R:]]) u^T + bias, for each row of x. Low-rank, PIFA's form of it (PMLR 267).

    Args:
        x: `[..., K]`.
        u, c, order: `[N, R]`, `[R, K - R]` and `[K]`, a permutation as int32 or int64.
        bias, impl, activation: as in `low_rank_linear`, like what is returned and raised.
    """
    r = u.shape[-1]
    check_shapes(x, order.shape == x.shape[-1:] and c.shape == (r, x.shape[-1] - r), u=u, c=c, order=order)
    return run("pivoted", x, bias, impl, activation, u=u, c=c, order=order)


def monarch_linear(
    x: Tensor, u: Tensor, v: Tensor, bias: Tensor | None = None, impl: str | None = None, activation: str = ""
) -> Tensor:
    """Block (i, j) of the matrix is u_ij v_ij. Monarch, arXiv 2204.00595, with general block rank r.

    Args:
        x: `[..., K]` with K = B1 * P.
        u, v: `[B2, Q, B1*r]` and `[B1, B2*r, P]`.
        bias, impl, activation: as in `low_rank_linear`, like what is returned and raised.
    """
    fits = x.shape[-1] == v.shape[0] * v.shape[2] and v.shape[1] * v.shape[0] == u.shape[2] * u.shape[0]
    check_shapes(x, fits, u=u, v=v)
    return run("monarch", x, bias, impl, activation, u=u, v=v)


def blast_linear(
    x: Tensor,
    u: Tensor,
    s: Tensor,
    v: Tensor,
    bias: Tensor | None = None,
    impl: str | None = None,
    activation: str = "",
) -> Tensor:
    """Block (i, j) of the matrix is u_i diag(s_ij) v_j. BLAST, arXiv 2410.21262, with B1 x B2 blocks.

    Args:
        x: `[..., K]` with K = B1 * P.
        u, s, v: `[B2, Q, R]`, `[B2, B1, R]` and `[B1, R, P]`.
        bias, impl, activation: as in `low_rank_linear`, like what is returned and raised.
    """
    (b1, r, p), b2 = v.shape, u.shape[0]
    check_shapes(x, x.shape[-1] == b1 * p and u.shape[2] == r and s.shape == (b2, b1, r), u=u, s=s, v=v)
    return run("blast", x, bias, impl, activation, u=u, s=s, v=v)


def run(structure: str, x: Tensor, bias: Tensor | None, impl: str | None, activation: str, **factors: Tensor) -> Tensor:
    """The layer by the implementation that `impl` asks for."""
    check_activation(activation)
    # an activation in the last stage saves a pass over the output, for which cuBLAS has no match
    kind = "activated" if activation else structure
    impl = resolve_impl(impl, kind, x, *factors.values(), bias)
    if impl == "triton":
        return getattr(library, structure)(x, *factors.values(), bias, activation)
    if impl == "dense":
        return activated(reference.dense_linear(x, structure, bias, **factors), activation)
    return activated(reference.LINEAR[structure](x, *factors.values(), bias), activation)


def check_shapes(x: Tensor, fits: bool, **factors: Tensor):
    if not fits:
        shapes = {name: tuple(f.shape) for name, f in factors.items()}
        raise ValueError(f"x of shape {tuple(x.shape)} and factors of shapes {shapes} do not fit each other")
