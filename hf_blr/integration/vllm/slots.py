"""Parameters under the checkpoint's names, by which vLLM's loaders find the shards of a layer.

A loader of vLLM looks a name up among a layer's parameters and calls the `weight_loader` of what it finds with the
tensor and, where several matrices of the checkpoint are one layer, with the shard that it belongs to. Shards differ in
rank, structure and format, and with that in their tensors. So what stands under the names holds no numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from hf_blr.integration.vllm.shard import Shard

#: vLLM's names for the matrices of an attention layer's first projection
QKV = ("q", "k", "v")

Loader = Callable[..., None]


class Slots(nn.Module):
    """Holds the slots of what the checkpoint keeps under `<factor>.<name>`: codes and scales."""

    #: where another shard keeps the factor as one tensor
    weight_loader: Loader | None = None


def add_slots(layer: nn.Module, shards: list[Shard]) -> None:
    """Give a layer an empty parameter for each name under which the checkpoint has a tensor of one of its shards."""
    dtypes: dict[str, torch.dtype] = {}
    for shard in shards:
        held = shard.layer.stored()
        for key, (own, _) in shard.stored.items():
            dtypes.setdefault(key, held[own].dtype)
    # modules first: of a factor that one shard keeps in bits and another does not, they have to be there
    for key in sorted(dtypes, key=lambda key: "." not in key):
        factor, _, leaf = key.partition(".")
        slot = nn.Parameter(torch.empty(0, dtype=dtypes[key]), requires_grad=False)
        loader = loader_of(key, shards)
        slot.weight_loader = loader  # type: ignore[attr-defined]
        slots = getattr(layer, factor, None)
        if not leaf and isinstance(slots, Slots):
            # some loaders ask for the attribute, which is the module then; others look among the parameters
            slots.weight_loader = loader
            layer.__dict__[factor], layer._parameters[factor] = slots, slot
            continue
        if leaf and slots is None:
            layer.add_module(factor, Slots())
        (getattr(layer, factor) if leaf else layer).register_parameter(leaf or factor, slot)


def loader_of(key: str, shards: list[Shard]) -> Loader:
    """The `weight_loader` of a slot: (parameter, tensor, shard id) -> None."""

    def load(slot: nn.Parameter, tensor: Tensor, shard_id: Any = None) -> None:
        shards[index_of(shard_id, shards)].load(key, tensor)

    return load


def index_of(shard_id: Any, shards: list[Shard]) -> int:
    """The place of the shard that vLLM calls "q", "k" or "v", or by its number; None where there is one.

    Raises:
        NotImplementedError: for a tensor that belongs to several shards.
    """
    index = QKV.index(shard_id) if shard_id in QKV else 0 if shard_id is None and len(shards) == 1 else shard_id
    if not isinstance(index, int) or index >= len(shards):
        names = ", ".join(shard.name for shard in shards)
        raise NotImplementedError(
            f"{names}: vLLM loads shard {shard_id!r} of these, a tensor each is expected; run the model with "
            "transformers"
        )
    return index
