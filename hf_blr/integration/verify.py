"""Nothing of a BLR model is left random: what a load must have brought, and what it brought.

transformers 5 reports missing, extra and (up to 5.17) misshapen tensors of a quantised model in a log line at most,
and leaves uninitialised memory where they should be.
"""

from __future__ import annotations

import re

import torch
from torch import nn

from hf_blr.integration.layout import ModuleNames
from hf_blr.integration.record import blr_modules
from hf_blr.plan import Plan
from hf_blr.structures import STRUCTURES
from hf_blr.targets import keep_in_fp32_names

Expected = dict[str, tuple[torch.Size, torch.dtype]]

FACTOR_NAMES = frozenset(name for spec in STRUCTURES.values() for name in spec.factor_names)


def expected_tensors(model: nn.Module) -> Expected:
    """{parameter: (shape, dtype)} of a model that has its final modules and waits for its weights."""
    return {name: (parameter.shape, parameter.dtype) for name, parameter in model.named_parameters()}


def check_files(model: nn.Module, plan: Plan, files: list[str] | None):
    """Compare the headers of a BLR checkpoint's safetensors files with the plan, before any tensor is read.

    Raises:
        ValueError: naming the tensors that a planned module has no place for, or that have another shape.
    """
    names, extra, misshapen = ModuleNames(model), [], []
    for key, shape in stored_shapes(files or []):
        owner, _, leaf = key.rpartition(".")
        name = names.find(owner)
        if name is None:
            # tensors of a head that this class does not have
            continue
        if name not in plan:
            if leaf in FACTOR_NAMES and not hasattr(names.modules[name], leaf):
                extra.append(f"{key} (the config's layers do not list this module)")
            continue
        wanted = plan[name].spec.factor_shapes()
        if plan[name].bias:
            wanted["bias"] = (plan[name].spec.out_features,)
        if leaf not in wanted:
            extra.append(f"{key} (a {plan[name].spec.structure} module has {', '.join(wanted)})")
        elif shape != wanted[leaf]:
            misshapen.append(f"{key} (shape {shape}, the config's layers say {wanted[leaf]})")
    if extra or misshapen:
        raise ValueError(
            f"{(extra + misshapen)[0].partition(' ')[0]}: the checkpoint does not fit its own config. "
            + describe("Tensors without a place", extra)
            + describe("Tensors of another shape", misshapen)
            + "Load a dense checkpoint with blr_config= instead of a config that says it is compressed, and a compressed "
            "one with the config.json that was saved with it"
        )


def stored_shapes(files: list[str]):
    """(name, shape) of every tensor in the safetensors files among `files`; nothing else is read."""
    from safetensors import safe_open

    for file in files:
        if file.endswith(".safetensors"):
            with safe_open(file, framework="pt") as tensors:
                for key in tensors.keys():  # noqa: SIM118  safe_open is no mapping
                    yield key, tuple(tensors.get_slice(key).get_shape())


def check_loaded(model: nn.Module, expected: Expected, complete: bool):
    """After the load: every tensor present, in its shape; floating-point ones are cast to their dtype.

    Args:
        model: as the loader left it.
        expected: from `expected_tensors`, before the load.
        complete: the checkpoint is a BLR checkpoint, so that no part of the model's body may be missing. Other
            models may lack what transformers then initialises with a warning.

    Raises:
        ValueError: naming what is missing or misshapen.
    """
    missing, misshapen = [], []
    compressed = blr_modules(model)
    body = body_pattern(model) if complete and saved_from_this_class(model) else None
    for owner_name, owner in model.named_modules():
        for leaf, parameter in owner.named_parameters(recurse=False):
            name = f"{owner_name}.{leaf}".lstrip(".")
            if parameter.is_meta and hasattr(owner, "_hf_hook"):
                # on disk or waiting on another device: accelerate brings it in for each forward
                continue
            if not is_loaded(parameter) and (owner_name in compressed or (body and body.match(name))):
                missing.append(name)
            elif name in expected and parameter.shape != expected[name][0]:
                misshapen.append(
                    f"{name} (shape {tuple(parameter.shape)}, expected {tuple(expected[name][0])})"
                )
    if missing or misshapen:
        raise ValueError(
            f"{(missing + misshapen)[0].partition(' ')[0]}: the checkpoint does not fit the model. "
            + describe("Missing tensors, which would have stayed random", missing)
            + describe("Tensors of another shape", misshapen)
            + "Load a dense checkpoint with blr_config= instead of a config that says it is compressed; if the checkpoint "
            "is a compressed one, it is incomplete or its config.json belongs to another: save or fetch it again"
        )
    cast_parameters(model, expected)


def mark_loaded(parameter: nn.Parameter):
    """As the loader marks what it read from the checkpoint or tied to it, and nothing else."""
    parameter._is_hf_initialized = True


def is_loaded(parameter: nn.Parameter) -> bool:
    return getattr(parameter, "_is_hf_initialized", False) and not parameter.is_meta


def saved_from_this_class(model: nn.Module) -> bool:
    """Whether the checkpoint was saved from the model's own class, so that no part of it may be missing."""
    return type(model).__name__ in (getattr(model.config, "architectures", None) or ())


def body_pattern(model: nn.Module) -> re.Pattern:
    """Matches the parameters below the head, except those that the model's class lets be missing."""
    base = f"{model.base_model_prefix}." if hasattr(model, model.base_model_prefix or "") else ""
    optional = getattr(model, "_keys_to_ignore_on_load_missing", None) or ()
    return re.compile("".join(f"(?!.*{pattern})" for pattern in optional) + re.escape(base))


def cast_parameters(model: nn.Module, expected: Expected):
    """Cast what kept the checkpoint's dtype; up to 5.17, transformers leaves every renamed tensor as it was stored."""
    kept = keep_in_fp32_names(model)
    for name, parameter in model.named_parameters():
        if name not in expected or parameter.is_meta or any(f".{part}." in f".{name}." for part in kept):
            continue
        dtype = expected[name][1]
        if parameter.is_floating_point() and parameter.dtype != dtype:
            parameter.data = parameter.data.to(dtype)


def describe(title: str, entries: list[str], shown=8) -> str:
    """`title: a, b and 3 more. `, or nothing for an empty list."""
    if not entries:
        return ""
    more = f" and {len(entries) - shown} more" if len(entries) > shown else ""
    return f"{title}: {', '.join(entries[:shown])}{more}. "
