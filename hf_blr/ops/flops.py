"""What the registered ops cost, for PyTorch's FLOP counter; without it they count as nothing."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any

import torch

from hf_blr.ops.grouped import ops_of
from hf_blr.structures import FACTOR, structures, whole_structures

Shape = Sequence[int]


def register(counter: ModuleType) -> None:
    """Add the formulas to `torch.utils.flop_counter`; a second call changes nothing."""
    for packet, formula in formulas():
        if packet not in counter.flop_registry:
            counter.register_flop_formula(packet)(formula)


def formulas() -> Iterator[tuple[Any, Callable[..., int]]]:
    """(op, its operations from the shapes of its tensors) of every structure with kernels, and of attention."""
    from hf_blr.ops import attention  # noqa: F401 (defines the op)

    for record in (*structures().values(), *whole_structures().values()):
        if record.float8:
            yield getattr(torch.ops.hf_blr, f"{record.name}_float8"), float8_formula(len(record.spec.names(FACTOR)))
        if record.float8_grouped:
            yield getattr(torch.ops.hf_blr, f"{record.name}_float8_grouped"), float8_formula(None)
        if record.kernels:
            count = len(record.spec.names(FACTOR))
            yield getattr(torch.ops.hf_blr, record.name), forward_formula(count)
            yield getattr(torch.ops.hf_blr, f"{record.name}_backward"), backward_formula(count)
        if record.grouped:
            yield from ((op, several) for op in ops_of(record.name))
    yield torch.ops.hf_blr.one_query_attention, one_query_attention
    yield torch.ops.hf_blr.expert_rows, rows_of_experts
    yield torch.ops.hf_blr.expert_rows_in_bits, rows_of_experts
    yield torch.ops.hf_blr.expert_products, rows_of_experts
    yield torch.ops.hf_blr.expert_outer_products, outer_products_of_experts


def products(x: Shape, *factors: Shape) -> int:
    """Each number of the factors meets each row of x `[T, K]` once: a multiplication and an addition."""
    return 2 * x[0] * sum(map(math.prod, factors))


def forward_formula(count: int) -> Callable[..., int]:
    """Of an op whose first `count` tensors behind x are factors."""

    def formula(x: Shape, *tensors: Any, **kwargs: Any) -> int:
        return products(x, *tensors[:count])

    return formula


def backward_formula(count: int) -> Callable[..., int]:
    """Gradients of x and of `count` factors: those of the last stage, of mixes between, and of the first stage."""

    def formula(grad: Shape, x: Shape, *inputs: Any, **kwargs: Any) -> int:
        (last, *mixes, first), (y, (need_x, need_last, *need_mixes, need_first)) = inputs[:count], inputs[-2:]
        through = need_x or need_first
        work = [last] * (need_last + (through or any(need_mixes))) + [first] * (need_x + need_first)
        # y is computed again where it was not kept
        work += [first] * ((need_last or any(need_mixes)) and not math.prod(y))
        for mix, need_mix in zip(mixes, need_mixes, strict=True):
            work += [mix] * (need_last + need_mix + through)
        return products(x, *work)

    return formula


def float8_formula(count: int | None) -> Callable[..., int]:
    """Of an op on cast inputs, whose first `count` tensors of a list are factors; None: all of them."""

    def formula(x: Shape, x_scale: Shape, tensors: Sequence[Shape], *others: Any, **kwargs: Any) -> int:
        return products(x, *tensors[:count])

    return formula


def several(x: Shape, *lists: Any, **kwargs: Any) -> int:
    """Of grouped layers: lists of u, of s where there is one, and of v."""
    *factors, _ = [entry for entry in lists if not isinstance(entry, str)]
    return products(x, *(shape for shapes in factors for shape in shapes))


def rows_of_experts(x: Shape, w: Shape, *others: Any, **kwargs: Any) -> int:
    """Of rows `[S, (B,) K]`, each by the matrix of one expert of `[E, (B,) N, K or words]`."""
    return 2 * math.prod(x) * w[-2]


def outer_products_of_experts(grad: Shape, x: Shape, *others: Any, **kwargs: Any) -> int:
    """Of rows `[S, N]` and `[S, K]`, each into the gradient of one expert's matrix."""
    return 2 * math.prod(grad) * x[-1]


def one_query_attention(q: Shape, k: Shape, *others: Any, **kwargs: Any) -> int:
    """Scores and sums, for every query over all keys, seen or not."""
    batch, heads, _, d = q
    return 4 * batch * heads * k[2] * d
