"""Nothing of a BLR model stays random: what a load must have brought, and what it brought.

transformers 5 reports missing and (up to 5.17) misshapen tensors of a quantised model in a log line at most,
and leaves uninitialised memory where they should be.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import torch
from torch import nn

from hf_blr.linear import BLRLinear, blr_modules
from hf_blr.targets import keep_in_fp32_names

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Expected = dict[str, tuple[torch.Size, torch.dtype]]


def expected_tensors(model: nn.Module) -> Expected:
    """{parameter or index: (shape, dtype)} of a model that has its final modules and waits for its weights."""
    indices = {
        f"{name}.{leaf}": index
        for name, module in blr_modules(model).items()
        for leaf, index in module.indices().items()
    }
    return {name: (t.shape, t.dtype) for name, t in (*model.named_parameters(), *indices.items())}


def check_loaded(model: PreTrainedModel, expected: Expected, complete: bool) -> None:
    """After the load: every tensor is present and in its shape. Floating-point ones are cast to their dtype.

    Args:
        model: as the loader left it.
        expected: from `expected_tensors`, before the load.
        complete: the checkpoint is a BLR checkpoint, so that nothing that its class has may be missing. A
            dense one may lack what transformers then initialises, with a warning.

    Raises:
        ValueError: naming what is missing or misshapen.
    """
    missing, misshapen = [], []
    compressed = blr_modules(model)
    own = own_pattern(model) if complete and saved_from_this_class(model) else None
    for owner_name, owner in model.named_modules():
        indices = owner.indices() if isinstance(owner, BLRLinear) else {}
        for leaf, parameter in (*owner.named_parameters(recurse=False), *indices.items()):
            name = f"{owner_name}.{leaf}".lstrip(".")
            if parameter.is_meta and hasattr(owner, "_hf_hook"):
                # offloaded: accelerate brings it in for each forward
                continue
            required = owner_name in compressed or (own is not None and own.match(name))
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
    for name, parameter in model.named_parameters():
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
