"""Statistics of a model whose matrices do not fit into memory together: gathered part by part, and put away."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hf_blr.calibration.blocks import numbered
from hf_blr.calibration.precision import calibrating
from hf_blr.calibration.store import Kept, Store, StoredTensors
from hf_blr.dense import feature_sizes
from hf_blr.factorize.metric import metric_blocks

if TYPE_CHECKING:
    from hf_blr.calibration.fisher import Statistics

#: bytes of a number in a matrix of statistics
FLOAT32 = 4


def in_pieces(
    model: nn.Module, names: list[str], labels: Mapping[str, str], limit: int | None, output_grams: bool
) -> list[list[str]]:
    """The layers in runs whose matrices take at most `limit` bytes each; a layer that takes more is one by itself.

    Args:
        names: dense linear layers.
        labels: {layer: the name under which its matrices are summed}; those of one label stay together.
        limit: None for all layers at once.
        output_grams: whether there are matrices G, beside H.
    """
    if limit is None:
        return [names]
    together: dict[str, list[str]] = {}
    for name in names:
        together.setdefault(labels.get(name, name), []).append(name)
    pieces: list[list[str]] = []
    room = 0
    for layers in together.values():
        k, n = feature_sizes(model.get_submodule(layers[0]))
        size = FLOAT32 * (k * k + output_grams * n * n // metric_blocks(n))
        if not pieces or size > room:
            pieces.append([])
            room = limit
        pieces[-1] += layers
        room -= size
    return pieces


def put_away(part: Statistics, store: Store) -> Statistics:
    """The same statistics, with their matrices out of the way; see `Store`."""
    return replace(
        part,
        grams=StoredTensors(store.keep_all(part.grams)),
        output_grams=StoredTensors(store.keep_all(part.output_grams)),
    )


def joined(parts: list[Statistics]) -> Statistics:
    """The statistics of parts of the layers as those of all."""

    def both(each: list[Mapping[str, Tensor]]) -> StoredTensors:
        kept: dict[str, Kept] = {}
        for tensors in each:
            assert isinstance(tensors, StoredTensors)
            kept |= tensors.kept
        return StoredTensors(kept)

    return replace(
        parts[0],
        grams=both([part.grams for part in parts]),
        output_grams=both([part.output_grams for part in parts]),
        unreached=frozenset().union(*(part.unreached for part in parts)),
        rows={name: count for part in parts for name, count in part.rows.items()},
    )


@contextmanager
def recomputed(model: nn.Module, names: list[str]) -> Iterator[None]:
    """Inside, the blocks around these layers keep what enters them, and run again in the backward.

    Transformers' own gradient checkpointing does so for models in training mode alone.
    """
    blocks = {inside[0]: model.get_submodule(inside[0]) for name in names if (inside := numbered(name))}
    own = {name: vars(block).get("forward") for name, block in blocks.items()}
    try:
        for block in blocks.values():
            vars(block)["forward"] = running_again(block)
        yield
    finally:
        for name, block in blocks.items():
            del vars(block)["forward"]
            if own[name] is not None:
                vars(block)["forward"] = own[name]


def running_again(block: nn.Module) -> Callable[..., Any]:
    """Its forward, whose activations are not kept for the backward; nothing in it is random in evaluation mode."""

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        # the first time it runs inside of the model, whose run says so
        return nullcontext(), calibrating(block)

    return partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)
