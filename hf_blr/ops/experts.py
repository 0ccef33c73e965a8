"""Mixtures of experts: rows, each of which meets the factors of an expert of its own.

A structure's form for experts is written once, in `Routed.product` and its siblings. What these run depends on how many
rows there are. Few read their experts' factors one by one, by a kernel; many are sorted, and each expert multiplies its
own. Neither asks for counts on the host, so that both run in a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hf_blr.ops.bits import InBits
from hf_blr.ops.dispatch import check_impl, compute_dtype, current_impl, why_not_triton
from hf_blr.ops.expert_products import product
from hf_blr.ops.library import contiguous_rows, define_op
from hf_blr.ops.rules.experts import FEW_ROWS


class Routed(NamedTuple):
    """S = T k rows, pairs of a token and one of its k experts.

    experts: `[S]` integers, of each row.
    order: `[S]` the pair, token * k + place, that is in each row; None: rows are in the order of pairs.
    offsets: `[E]` int32, where the rows of each expert end; None: a kernel reads for each row.
    plain: whether products are a loop over experts.
    """

    experts: Tensor
    order: Tensor | None
    offsets: Tensor | None
    plain: bool

    def enter(self, x: Tensor, each: int) -> Tensor:
        """x `[T, K]`, which meets `each` = k experts -> rows `[S, K]`."""
        if self.order is None:
            return x[:, None].expand(-1, each, -1).flatten(0, 1)
        return x[self.order // each]

    def leave(self, rows: Tensor, weights: Tensor) -> Tensor:
        """Rows `[S, N]`, weights `[T, k]` of the pairs -> `[T, N]`, the weighted sum over each token's experts."""
        if self.order is not None:
            rows = rows.index_select(0, inverse(self.order))
        return (rows.view(*weights.shape, rows.shape[-1]) * weights[..., None]).sum(1)

    def own(self, t: Tensor) -> Tensor:
        """What belongs to each row's expert, of t `[E, ...]` -> `[S, ...]`."""
        return t.index_select(0, self.experts)

    def each_its_own(self) -> Routed:
        """The same rows, each of which is the only one of an expert of its own."""
        number = torch.arange(len(self.experts), device=self.experts.device)
        return self._replace(experts=number, offsets=None if self.offsets is None else (number + 1).int())

    def product(self, x: Tensor, w: Tensor | InBits) -> Tensor:
        """Each row of x `[S, K]` times its expert's matrix, of w `[E, N, K]` -> `[S, N]`."""
        if self.offsets is None:
            return self.by_kernel(x[:, None], one_block(w))[:, 0]
        dtype = compute_dtype(x)
        return product(contiguous_rows(x, dtype), numbers_of(w, dtype), self.offsets, self.plain)

    def blocks(self, x: Tensor, w: Tensor | InBits) -> Tensor:
        """Each block of x `[S, B, P]` times that of its row's expert, of w `[E, B, Q, P]` -> `[S, B, Q]`."""
        if self.offsets is None:
            return self.by_kernel(x, w)
        dtype = compute_dtype(x)
        x, w = contiguous_rows(x, dtype), numbers_of(w, dtype)
        # one product for each block of each expert, whose rows lie side by side: block after block in each expert
        rows, count, length = x.shape
        stops = self.offsets.long()
        sizes = stops.diff(prepend=stops.new_zeros(1))
        first, size = self.own(torch.stack([stops - sizes, sizes], 1)).unbind(1)
        number = torch.arange(count, device=x.device)
        inside = torch.arange(rows, device=x.device) - first
        places = ((count * first + inside)[:, None] + size[:, None] * number).view(-1)
        ends = (count * (stops - sizes)[:, None] + sizes[:, None] * (number + 1)).view(-1).int()
        moved = x.reshape(rows * count, length).index_select(0, inverse(places))
        out = product(moved, w.flatten(0, 1), ends, self.plain)
        return out.index_select(0, places).view(rows, count, out.shape[-1])

    def by_kernel(self, x: Tensor, w: Tensor | InBits) -> Tensor:
        """`blocks` by the kernel that reads for each row."""
        dtype = compute_dtype(x)
        x = contiguous_rows(x, dtype)
        found: Tensor
        if isinstance(w, InBits):
            found = torch.ops.hf_blr.expert_rows_in_bits(x, w.codes, w.scale, self.experts, w.bits, w.length)
        else:
            found = torch.ops.hf_blr.expert_rows(x, w.to(dtype), self.experts)
        return found


class Gathered(Routed):
    """The same by PyTorch's own batched product: each row gets a copy of its expert's matrix, and no op is ours."""

    def product(self, x: Tensor, w: Tensor | InBits) -> Tensor:
        return torch.matmul(self.own(numbers_of(w, x.dtype)), x[..., None])[..., 0]

    #: likewise of blocks: x `[S, B, P]`, w `[E, B, Q, P]`
    blocks = product


def gathered_rows(chosen: Tensor) -> Gathered:
    """Rows in the order of pairs, whose experts are chosen `[T, k]`."""
    return Gathered(chosen.reshape(-1), None, None, True)


def one_block(w: Tensor | InBits) -> Tensor | InBits:
    """A factor `[E, N, K]` as one block `[E, 1, N, K]`."""
    return w._replace(codes=w.codes[:, None], scale=w.scale[:, None]) if isinstance(w, InBits) else w[:, None]


def numbers_of(w: Tensor | InBits, dtype: torch.dtype) -> Tensor:
    """A factor in this dtype. Raises TypeError for one in bits, which the kernel for few rows alone takes."""
    if isinstance(w, InBits):
        raise TypeError("sorted rows are multiplied by numbers, got codes; hand in the factor in a dtype")
    return w.to(dtype)


def inverse(order: Tensor) -> Tensor:
    """The permutation that undoes this one."""
    return torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))


def route_rows(
    x: Tensor, chosen: Tensor, num_experts: int, weights: Sequence[Tensor], impl: str | None = None
) -> Routed:
    """How the rows of tokens x `[T, K]`, whose experts are chosen `[T, k]`, are multiplied.

    The rule of "auto": the kernel for few rows where no gradient is wanted, on a GPU.

    Args:
        x: the tokens.
        chosen: integers below `num_experts`.
        num_experts: E.
        weights: numbers that rows will be multiplied by.
        impl: of `dispatch.IMPLS`, or None for the default.

    Raises:
        ValueError: for an unknown name.
        RuntimeError: if "triton" is asked for and cannot run; it says why.
    """
    impl = current_impl() if impl is None else check_impl(impl)
    experts, reason = chosen.reshape(-1), None
    if torch.is_grad_enabled() and any(t.requires_grad for t in (x, *weights)):
        reason = "the kernel for experts has no gradients"
    elif impl in ("auto", "triton"):
        reason = why_not_triton(x, weights)
    if impl == "triton" and reason is not None:
        raise RuntimeError(f'impl="triton" cannot run experts: {reason}; use impl="auto" or "reference"')
    if impl == "triton" or (impl == "auto" and reason is None and x.is_cuda and len(experts) <= FEW_ROWS):
        return Routed(experts, None, None, False)
    experts, order = torch.sort(experts)
    every = torch.arange(num_experts, device=x.device, dtype=experts.dtype)
    offsets = torch.searchsorted(experts, every, right=True, out_int32=True)
    return Routed(experts, order, offsets, impl == "reference")


def _rows(x: Tensor, w: Tensor, experts: Tensor) -> Tensor:
    from hf_blr.ops.triton.expert_rows import expert_rows

    found: Tensor = expert_rows(x, w, experts)
    return found


def _rows_in_bits(x: Tensor, codes: Tensor, scale: Tensor, experts: Tensor, bits: int, length: int) -> Tensor:
    from hf_blr.ops.triton.bits import weights_in_bits
    from hf_blr.ops.triton.expert_rows import expert_rows

    found: Tensor = expert_rows(x, weights_in_bits(codes, scale, bits, length), experts)
    return found


def _rows_fake(x: Tensor, w: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape[0], x.shape[1], w.shape[2])


define_op("expert_rows(Tensor x, Tensor w, Tensor experts) -> Tensor", _rows, _rows_fake)
define_op(
    "expert_rows_in_bits(Tensor x, Tensor codes, Tensor scale, Tensor experts, int bits, int length) -> Tensor",
    _rows_in_bits,
    _rows_fake,
)
