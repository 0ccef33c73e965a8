"""A look into a checkpoint's headers before anything is loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from hf_blr.checkpoint.files import Header
from hf_blr.checkpoint.layout import ModuleNames
from hf_blr.checkpoint.verify import describe
from hf_blr.formats.values import fault_of_dtype
from hf_blr.plan import Plan
from hf_blr.structures import FACTOR, INDEX, structures, whole_structures

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def check_files(model: PreTrainedModel, plan: Plan, stored: list[Header]) -> None:
    """Compare what a BLR checkpoint's files hold with the plan, before any tensor is read.

    Args:
        model: still with its dense modules.
        plan: under the model's own module names.
        stored: what `stored_tensors` found in its files; of none, the check after the load must do.

    Raises:
        ValueError: naming the tensors that are missing, have no place in a planned module, or have another shape or
            dtype.
    """
    names = ModuleNames(model)
    extra: list[str] = []
    misshapen: list[str] = []
    records = {**structures(), **whole_structures()}
    of_layers = {tensor for record in records.values() for tensor in record.spec.names()}
    missing = {name: dict.fromkeys(layer.stored()) for name, layer in plan.items()} if stored else {}
    found: dict[tuple[str, str], str] = {}
    for key, shape, dtype in stored:
        name, leaf = place_of(key, names)
        if name not in plan:
            # a bias that the file keeps beside the layer, under a name of its own
            renamed = place_of(names.renamed_key(key), names)
            name, leaf = renamed if renamed[0] in plan else (name, leaf)
        if name is None:
            # of a head that this class does not have
            continue
        other = found.setdefault((name, leaf), key)
        if other != key:
            extra.append(f"{key} (the same tensor as {other}, under another name)")
            continue
        if name not in plan:
            own = getattr(names.modules[name], leaf, None)
            if isinstance(own, torch.Tensor) and own.is_floating_point() and not dtype.is_floating_point:
                misshapen.append(f"{key} ({fault_of_dtype(FACTOR, dtype)})")
            if leaf.partition(".")[0] in of_layers and not hasattr(names.modules[name], leaf):
                extra.append(f"{key} (the config's layers do not list this module)")
            continue
        wanted = plan[name].stored()
        if leaf not in wanted:
            extra.append(f"{key} (a {plan[name].spec.structure} module has {', '.join(wanted)})")
            continue
        missing[name].pop(leaf, None)
        kinds = plan[name].storage.stored(plan[name].spec)
        kind = kinds[leaf].kind if leaf in kinds else FACTOR
        wrong = fault_of_dtype(kind, dtype)
        if shape != wanted[leaf][0]:
            misshapen.append(f"{key} (shape {shape}, the config's layers say {wanted[leaf][0]})")
        elif wrong is not None:
            misshapen.append(f"{key} ({wrong})")
        elif kind != INDEX and wanted[leaf][1] not in (None, dtype):
            misshapen.append(f"{key} ({dtype}, the config's layers say {wanted[leaf][1]})")
    # before the loader makes room for what no file has
    absent = [f"{name}.{leaf}" for name, leaves in missing.items() for leaf in leaves]
    if absent or extra or misshapen:
        raise ValueError(
            f"{(absent + extra + misshapen)[0].partition(' ')[0]}: the checkpoint does not fit its own config. "
            + describe("Missing tensors", absent)
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


def check_count(layers: dict[str, dict[str, Any]], stored: list[Header]) -> None:
    """Raises ValueError if the plan lists more modules than the files have tensors, before anybody looks for them."""
    if stored and len(layers) > len(stored):
        raise ValueError(
            f"{next(iter(layers))}: the config's layers list {len(layers)} modules, but the checkpoint's files have "
            f"{len(stored)} tensors, and each module has one at least; load the checkpoint with the config.json that "
            "was saved with it"
        )
