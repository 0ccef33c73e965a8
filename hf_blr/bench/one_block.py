"""Decoding with one compiled block for all layers.

A block finds its keys and values by its own number, so that torch.compile would compile it once for every layer. During
a step each block is therefore handed a cache that holds its own layer alone, in which its number is 0: what is compiled
for one of them then serves all.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from hf_blr.bench.forms import compile_pieces, repeated_blocks, switched_on
from hf_blr.inference.replayed import cache_of

if TYPE_CHECKING:
    from transformers import Cache

#: names of configs for attention that reads its number for something else than its cache
OTHER_USES = ("scale_attn_by_inverse_layer_idx",)


def why_not_one_block(model: nn.Module, cache: Cache) -> str | None:
    """Why the blocks of this model cannot share one compilation with a `StaticCache`; None if they can."""
    from transformers.cache_utils import StaticLayer

    blocks = repeated_blocks(model)
    if len({type(block) for block in blocks}) != 1 or len(blocks) != len(cache.layers):
        return f"{len(blocks)} repeated blocks for {len(cache.layers)} layers of the cache"
    if any(not numbered(block) for block in blocks):
        return "blocks without a layer_idx"
    if any(getattr(model.config, name, False) for name in OTHER_USES):
        return "attention that depends on its number"
    others = {type(layer).__name__ for layer in cache.layers if type(layer) is not StaticLayer}
    return f"layers of the cache are {', '.join(sorted(others))}" if others else None


def numbered(block: nn.Module) -> list[nn.Module]:
    """The modules of a block that hold its number."""
    return [module for module in block.modules() if isinstance(getattr(module, "layer_idx", None), int)]


def pieces_outside(model: nn.Module) -> list[nn.Module]:
    """Norms and rotary embeddings that are in no block."""
    inside = {module for block in repeated_blocks(model) for module in block.modules()}
    kinds = ("RMSNorm", "LayerNorm", "RotaryEmbedding")
    return [m for m in model.modules() if m not in inside and type(m).__name__.endswith(kinds)]


def with_one_block(model: nn.Module, mode: str, backend: str | Callable = "inductor") -> Callable:
    """`model`'s call for one decoding step on a `StaticCache` that has seen a prompt; its blocks run compiled.

    Args:
        model: one for which `why_not_one_block` says nothing.
        mode, backend: as in `compile_pieces`.
    """
    blocks, others = repeated_blocks(model), pieces_outside(model)
    calls = compile_pieces(blocks, mode, backend, fullgraph=True)
    other_calls = compile_pieces(others, mode, backend, forget=False)
    held: dict[str, Any] = {}

    def step(**inputs: Any) -> Any:
        cache = cache_of(inputs)
        if held.get("cache") is not cache:
            held["cache"] = cache
            held["calls"] = [handing(call, own_layer(cache, i)) for i, call in enumerate(calls)]
        with switched_on([*blocks, *others], [*held["calls"], *other_calls]), numbered_zero(blocks):
            return model(**inputs)

    return step


def own_layer(cache: Cache, index: int) -> Cache:
    """A cache of this layer alone, on the same memory.

    Its tensors are other objects: the cache's own are marked as static addresses, for each of which torch.compile would
    compile again.
    """
    from transformers import Cache

    layer = copy.copy(cache.layers[index])
    for name, value in vars(layer).items():
        if isinstance(value, Tensor):
            setattr(layer, name, value.detach())
    return Cache(layers=[layer])


def handing(call: Callable, own: Cache) -> Callable:
    """`call` with this cache in the place of the one that it is handed."""

    def replaced(value: Any) -> Any:
        return own if isinstance(value, type(own)) else value

    def handed(*args: Any, **kwargs: Any) -> Any:
        return call(*map(replaced, args), **{name: replaced(value) for name, value in kwargs.items()})

    return handed


@contextlib.contextmanager
def numbered_zero(blocks: list[nn.Module]) -> Iterator[None]:
    """Within this context every block's number is 0."""
    before = [(module, module.layer_idx) for block in blocks for module in numbered(block)]
    for module, _ in before:
        module.layer_idx = 0  # type: ignore[assignment]
    try:
        yield
    finally:
        for module, number in before:
            module.layer_idx = number
