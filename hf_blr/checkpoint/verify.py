"""Nothing of a BLR model stays random: what a load must have brought, and what it brought.

transformers 5 reports missing and (up to 5.17) misshapen tensors of a quantised model in a log line at most,
and leaves uninitialised memory where they should be.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from hf_blr.formats import FactorInBits
from hf_blr.linear import BLRLinear, blr_modules
from hf_blr.targets import keep_in_fp32_names

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Expected = dict[str, tuple[torch.Size, torch.dtype]]


def expected_tensors(model: nn.Module) -> Expected:
    """{parameter or index: (shape, dtype)} of a model that has its final modules and waits for its weights."""
    return {name: (t.shape, t.dtype) for name, t in (*model.named_parameters(), *indices_of(model).items())}


def indices_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """{name: tensor} of the integers that belong to the factors."""
    return {
        f"{name}.{leaf}": index
        for name, module in blr_modules(model).items()
        for leaf, index in module.indices().items()
    }


def check_loaded(model: PreTrainedModel, expected: Expected, complete: bool) -> None:
    """After the load: every tensor is present and in its shape, and bits are such that they can be read.

    Floating-point tensors are cast to their dtype.

    Args:
        model: as the loader left it.
        expected: from `expected_tensors`, before the load.
        complete: the checkpoint is a BLR checkpoint, so that nothing that its class has may be missing. A
            dense one may lack what transformers then initialises, with a warning.

    Raises:
        ValueError: naming what is missing, misshapen, or holds codes or scales that mean nothing.
    """
    missing, misshapen = [], []
    compressed = tuple(f"{name}." for name in blr_modules(model))
    own = own_pattern(model) if complete and saved_from_this_class(model) else None
    for owner_name, owner in model.named_modules():
        indices = owner.indices() if isinstance(owner, BLRLinear) else {}
        for leaf, parameter in (*owner.named_parameters(recurse=False), *indices.items()):
            name = f"{owner_name}.{leaf}".lstrip(".")
            if parameter.is_meta and hasattr(owner, "_hf_hook"):
                # offloaded: accelerate brings it in for each forward
                continue
            required = name.startswith(compressed) or (own is not None and own.match(name))
            if required and not is_loaded(parameter):
                missing.append(name)
            elif name in expected and parameter.shape != expected[name][0]:
                shapes = f"shape {tuple(parameter.shape)}, expected {tuple(expected[name][0])}"
                misshapen.append(f"{name} ({shapes})")
    if missing or misshapen:
        raise ValueError(
            f"{(missing + misshapen)[0].partition(' ')[0]}: the checkpoint does not fit the model. "
            + describe("Missing tensors, which would have stayed random", missing)
            + describe("Tensors of another shape", misshapen)
            + "Load a dense checkpoint with blr_config= instead of a config that says it is compressed; a "
            "compressed one is incomplete, or its config.json belongs to another: save or fetch it again"
        )
    cast_parameters(model, expected)
    check_bits(model)


def check_bits(model: nn.Module) -> None:
    """Of factors in bits, in memory or offloaded: they are valid, and the loader has not made them train.

    Raises:
        ValueError: naming the tensors with codes, scales or shapes that cannot be, or that offloading has cast.
    """
    faults = []
    for name, module in model.named_modules():
        if not isinstance(module, FactorInBits):
            continue
        module.requires_grad_(False)
        parts = module.parts()
        away: Any = getattr(getattr(module, "_hf_hook", None), "weights_map", None)
        read = {leaf: away[leaf] if part.is_meta and away is not None else part for leaf, part in parts.items()}
        cast = [leaf for leaf, part in parts.items() if read[leaf].dtype != part.dtype]
        if cast:
            # the first releases of transformers 5 do that, and every number would come out wrong
            raise ValueError(
                f"{name}.{cast[0]}: this transformers reads offloaded tensors as {read[cast[0]].dtype}, which destroys "
                f"bits stored as {parts[cast[0]].dtype}; upgrade transformers, or load without offload to disk"
            )
        if not any(part.is_meta for part in read.values()):
            fault = module.storage.fault(read, module.shape)
            faults += [] if fault is None else [f"{name}.{fault}"]
    if faults:
        raise ValueError(
            describe("The checkpoint is damaged", faults) + "Save or fetch it again, or compress the dense model anew"
        )


def mark_loaded(parameter: torch.Tensor) -> None:
    """As the loader marks what it read from the checkpoint or tied to it, and nothing else."""
    parameter._is_hf_initialized = True  # type: ignore[attr-defined]


def is_loaded(parameter: torch.Tensor) -> bool:
    """Whether the loader has marked it."""
    return getattr(parameter, "_is_hf_initialized", False) and not parameter.is_meta


def saved_from_this_class(model: PreTrainedModel) -> bool:
    """Whether the checkpoint's config names the model's own class, or none; another class may bring a new head."""
    named = getattr(model.config, "architectures", None)
    return not named or type(model).__name__ in named


def own_pattern(model: PreTrainedModel) -> re.Pattern[str]:
    """Matches the parameters, except those that the model's class lets be missing."""
    optional = getattr(model, "_keys_to_ignore_on_load_missing", None) or ()
    return re.compile("".join(f"(?!.*{pattern})" for pattern in optional))


def cast_parameters(model: nn.Module, expected: Expected) -> None:
    """Cast what kept the checkpoint's dtype.

    Up to 5.17, transformers leaves a tensor whose name differs between file and model as it was stored.
    """
    kept = keep_in_fp32_names(model)
    in_bits = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, FactorInBits))
    for name, parameter in model.named_parameters():
        if name.startswith(in_bits):
            # their dtypes are those of the file, which was checked before
            continue
        if name not in expected or parameter.is_meta or any(f".{part}." in f".{name}." for part in kept):
            continue
        dtype = expected[name][1]
        if parameter.is_floating_point() and parameter.dtype != dtype:
            parameter.data = parameter.data.to(dtype)


def describe(title: str, entries: list[str], shown: int = 8) -> str:
    """`title: a, b and 3 more. `, or nothing for an empty list."""
    if not entries:
        return ""
    more = f" and {len(entries) - shown} more" if len(entries) > shown else ""
    return f"{title}: {', '.join(entries[:shown])}{more}. "
