"""Attention of one query as a registered op: what is left between the projections when one token is decoded."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_blr.ops.dispatch import compute_dtype, resolve_impl
from hf_blr.ops.library import contiguous_rows, define_op

#: keys up to which the kernel was measured, and faster than PyTorch's
MOST_KEYS = 4096


def one_query_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float | None = None, impl: str | None = None
) -> Tensor:
    """softmax(scale q k^T) v over the keys that the mask shows, for one query of each head.

    Args:
        q: `[B, HQ, 1, D]`.
        k, v: `[B, H, L, D]`; HQ is a multiple of H, and neighbouring queries share a head of keys.
        mask: bool `[B, 1, 1, L]`, true for keys that are seen. A query that sees none gets zeros from the kernel.
        scale: of the scores; D ** -0.5 if left out.
        impl: "auto", "triton", "reference", or None for what `use_impl` set.

    Returns:
        `[B, 1, HQ, D]`, as transformers wants it. The kernel's has no gradient.

    Raises:
        ValueError: if the shapes do not fit each other.
        RuntimeError: if "triton" was asked for and cannot run here.
    """
    if not fits(q, k, v, mask):
        raise ValueError(
            f"expected q [B, HQ, 1, D], k, v [B, H, L, D] with HQ a multiple of H, and a bool mask [B, 1, 1, L], got "
            f"{tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)} and {mask.dtype} {tuple(mask.shape)}"
        )
    if resolve_impl(impl, q, (k, v)) == "triton":
        return by_kernel(q, k, v, mask, scale)
    groups = q.shape[1] // k.shape[1]
    k, v = (t.repeat_interleave(groups, 1) for t in (k, v))
    return F.scaled_dot_product_attention(q, k, v, mask, scale=scale).transpose(1, 2)


def by_kernel(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float | None) -> Tensor:
    """`one_query_attention` of tensors that the kernel is known to suit."""
    q, k, v, mask = (contiguous_rows(t, t.dtype) for t in (q, k, v, mask))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return torch.ops.hf_blr.one_query_attention(q, k, v, mask, scale)


def suits_kernel(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> bool:
    """Whether the kernel can, and should, attend for these: one query, a mask in memory, no gradient."""
    if mask is None or not fits(q, k, v, mask):
        return False
    if k.shape[2] > MOST_KEYS or not 16 <= q.shape[-1] <= 256 or q.dtype != compute_dtype(q):
        return False
    if torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v)):
        return False
    return resolve_impl(None, q, (k, v)) == "triton"


def fits(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> bool:
    """Whether these are one query a head, its keys, values and mask, as `one_query_attention` takes them."""
    fit = q.dim() == k.dim() == 4 and k.shape == v.shape and q.shape[2] == 1 and q.shape[1] % k.shape[1] == 0
    fit = fit and (q.shape[0], q.shape[3]) == (k.shape[0], k.shape[3])
    return fit and mask.dtype == torch.bool and mask.shape == (len(q), 1, 1, k.shape[2])


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> Tensor:
    from hf_blr.ops.triton.attend import attend

    return attend(q, k, v, mask.view(len(q), -1).view(torch.uint8), scale)


def _attend_fake(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> Tensor:
    return q.new_empty(q.shape[0], 1, q.shape[1], q.shape[3])


define_op(
    "one_query_attention(Tensor q, Tensor k, Tensor v, Tensor mask, float scale) -> Tensor", _attend, _attend_fake
)
