"""A look into a checkpoint's headers before anything is loaded."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

from hf_blr.checkpoint.layout import ModuleNames
from hf_blr.checkpoint.verify import describe
from hf_blr.plan import Plan
from hf_blr.structures import structures, whole_structures

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def check_files(model: PreTrainedModel, plan: Plan, files: list[str] | None) -> None:
    """Compare what a BLR checkpoint's safetensors files hold with the plan, before any tensor is read.

    Args:
        model: still with its dense modules.
        plan: under the model's own module names.
        files: the checkpoint's; None, and other formats, are left to the check after the load.

    Raises:
        ValueError: naming the tensors that a planned module has no place for, or that have another shape, or, where
            they stand for bits, another dtype.
    """
    names = ModuleNames(model)
    extra: list[str] = []
    misshapen: list[str] = []
    records = {**structures(), **whole_structures()}
    of_layers = {tensor for record in records.values() for tensor in record.spec.names()}
    for key, shape, dtype in stored_tensors(files or []):
        name, leaf = place_of(key, names)
        if name is None:
            # of a head that this class does not have
            continue
        if name not in plan:
            if leaf.partition(".")[0] in of_layers and not hasattr(names.modules[name], leaf):
                extra.append(f"{key} (the config's layers do not list this module)")
            continue
        wanted = plan[name].stored()
        if leaf not in wanted:
            extra.append(f"{key} (a {plan[name].spec.structure} module has {', '.join(wanted)})")
        elif shape != wanted[leaf][0]:
            misshapen.append(f"{key} (shape {shape}, the config's layers say {wanted[leaf][0]})")
        elif wanted[leaf][1] not in (None, dtype):
            misshapen.append(f"{key} ({dtype}, the config's layers say {wanted[leaf][1]})")
    if extra or misshapen:
        raise ValueError(
            f"{(extra + misshapen)[0].partition(' ')[0]}: the checkpoint does not fit its own config. "
            + describe("Tensors without a place", extra)
            + describe("Tensors of another shape or dtype", misshapen)
            + "Load a dense checkpoint with blr_config= instead of a config that says it is compressed, and "
            "a compressed one with the config.json that was saved with it"
        )


def place_of(key: str, names: ModuleNames) -> tuple[str | None, str]:
    """(the model's own name of the module that a tensor is for, the tensor's name in there); None: no such module."""
    owner, _, leaf = key.rpartition(".")
    name = names.find(owner)
    if name is None:
        # a factor in bits is a module of its own in the layer, which the dense model does not have
        owner, _, factor = owner.rpartition(".")
        name, leaf = names.find(owner), f"{factor}.{leaf}"
    return name, leaf


def stored_tensors(files: list[str]) -> Iterator[tuple[str, tuple[int, ...], torch.dtype]]:
    """(name, shape, dtype) of every tensor in those of the files that are safetensors."""
    from safetensors import safe_open

    for file in files:
        if file.endswith(".safetensors"):
            with safe_open(file, framework="pt") as tensors:
                for key in tensors.keys():  # noqa: SIM118  it is no mapping
                    entry = tensors.get_slice(key)
                    shape = tuple(entry.get_shape())
                    # an empty part of a tensor says its dtype in PyTorch's terms
                    yield key, shape, (entry[:0] if shape else tensors.get_tensor(key)).dtype
