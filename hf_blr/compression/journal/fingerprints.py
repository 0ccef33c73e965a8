"""By what a journal knows a model, a config, text and statistics again."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hf_blr.calibration.calls import Batch
from hf_blr.calibration.fisher import Statistics
from hf_blr.config import BLRConfig
from hf_blr.config.texts import is_mixture
from hf_blr.dense import at_hand


def fingerprint(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """SHA-256 of names, dtypes, shapes and numbers; a second for each gigabyte or so."""
    found = hashlib.sha256()
    for name, tensor in tensors:
        found.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def of_model(model: nn.Module) -> dict[str, Any]:
    return {"class": type(model).__name__, "weights": fingerprint(own_tensors(model))}


def own_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Each module's parameters and buffers, one module in memory after the other where they are offloaded."""
    for name, module in model.named_modules():
        with at_hand(module):
            for kind in (module.named_parameters(recurse=False), module.named_buffers(recurse=False)):
                yield from ((f"{name}.{key}", tensor) for key, tensor in kind)


def of_config(config: BLRConfig) -> dict[str, Any]:
    """All fields; of text in memory, which a checkpoint describes in words, its content."""
    fields = config.to_dict()
    if hasattr(config.dataset, "_fingerprint"):
        fields["dataset"] = config.dataset._fingerprint
    elif isinstance(config.dataset, (list, tuple)) and not is_mixture(config.dataset):
        fields["dataset"] = hashlib.sha256(repr(list(config.dataset)).encode()).hexdigest()
    return fields


def of_batches(batches: list[Batch]) -> str:
    return fingerprint((f"{i} {key}", value) for i, batch in enumerate(batches) for key, value in sorted(batch.items()))


def of_statistics(statistics: Statistics) -> str:
    both: list[Mapping[str, Tensor]] = [statistics.grams, statistics.output_grams]
    return fingerprint(item for each in both for item in sorted(each.items()))


def difference(one: Any, other: Any) -> str:
    """In a few words, where two fingerprints of one kind differ."""
    if not (isinstance(one, dict) and isinstance(other, dict)):
        return ""
    names = [name for name in sorted({*one, *other}) if one.get(name) != other.get(name)]
    return "; ".join(f"{name} was {one.get(name)!r}, is {other.get(name)!r}" for name in names)
