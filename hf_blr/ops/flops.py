"""What the registered ops cost, for PyTorch's FLOP counter; without it they count as nothing."""

from __future__ import annotations

import math
from types import ModuleType

import torch

from hf_blr.ops import attention, library, siblings  # noqa: F401 (define the ops)


def register(counter: ModuleType):
    """Add the formulas to `torch.utils.flop_counter`; a second call changes nothing."""
    for name, formula in FORMULAS.items():
        packet = getattr(torch.ops.hf_blr, name)
        if packet not in counter.flop_registry:
            counter.register_flop_formula(packet)(formula)


def products(x, *factors) -> int:
    """Each number of the factors meets each row of x `[T, K]` once: a multiplication and an addition."""
    return 2 * x[0] * sum(map(math.prod, factors))


def pair(x, u, v, *others, **kwargs) -> int:
    return products(x, u, v)


def blast(x, u, s, v, *others, **kwargs) -> int:
    return products(x, u, s, v)


def several(x, *lists, **kwargs) -> int:
    """Of siblings: lists of u, of s where there is one, and of v."""
    *factors, _ = [entry for entry in lists if not isinstance(entry, str)]
    return products(x, *(shape for shapes in factors for shape in shapes))


def pair_backward(grad, x, u, v, y, needs, **kwargs) -> int:
    """Gradients of x, u and v, or c; y is computed again where it was not kept."""
    need_x, need_u, need_v = needs
    again = [v] * (need_u and not math.prod(y))
    return products(x, *again, *[u] * (need_u + (need_x or need_v)), *[v] * (need_x + need_v))


def pivoted_backward(grad, x, u, c, order, y, needs, **kwargs) -> int:
    return pair_backward(grad, x, u, c, y, needs)


def blast_backward(grad, x, u, s, v, y, needs, **kwargs) -> int:
    need_x, need_u, need_s, need_v = needs
    again = [v] * ((need_u or need_s) and not math.prod(y))
    through = need_x or need_v
    mixes = [s] * (need_u + need_s + through)
    return products(x, *again, *mixes, *[u] * (need_u + (through or need_s)), *[v] * (need_x + need_v))


def one_query_attention(q, k, *others, **kwargs) -> int:
    """Scores and sums, for every query over all keys, seen or not."""
    batch, heads, _, d = q
    return 4 * batch * heads * k[2] * d


#: {op: its operations, from the shapes of its tensors}
FORMULAS = {
    "low_rank": pair,
    "pivoted": pair,
    "monarch": pair,
    "blast": blast,
    "monarch_siblings": several,
    "blast_siblings": several,
    "monarch_gated": several,
    "blast_gated": several,
    "low_rank_backward": pair_backward,
    "pivoted_backward": pivoted_backward,
    "monarch_backward": pair_backward,
    "blast_backward": blast_backward,
    "one_query_attention": one_query_attention,
}
