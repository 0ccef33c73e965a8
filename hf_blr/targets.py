"""Which modules of a model a config names."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from typing import Any

from torch import nn

from hf_blr.dense import feature_sizes
from hf_blr.experts import dense_layers

#: layers that steer others, and modules of such layers: a wrong sign in one sends a token to another expert
ROUTER_NAMES = frozenset({"gate", "router", "router_gate", "modality_router", "shared_expert_gate"})

#: modules whose layers pick what others attend to, which no gradient tells how well they do
PICKERS = frozenset({"indexer"})

#: layers with fewer features on one side are no matrices to factorise: maps from coordinates, or to one number a head
NARROWEST = 4
#: likewise of fewer numbers: those between the four streams of Gemma 3n, which it clamps in training
SMALLEST = 65

#: a regular expression that matches whole names, or names and their endings
Patterns = str | list[str]


def find_targets(
    model: nn.Module, target_modules: Patterns | None = None, modules_to_not_convert: Patterns | None = None
) -> list[str]:
    """The names of the dense layers to replace, in the model's order.

    Args:
        model: any module tree; those of transformers also say what their head and tied weights are.
        target_modules, modules_to_not_convert: as in `BLRConfig`.

    Raises:
        ValueError: if a pattern matches no dense linear layer, nothing is left to replace, or a named module shares
            its weight with another one.
    """
    dense = dense_layers(model)
    if target_modules is not None and target_modules != "all-linear":
        matched = match(target_modules, dense, "target_modules")
        shared = sorted(matched & tied_modules(model, dense))
        if shared:
            raise ValueError(
                f"{shared[0]} shares its weight with another module and cannot be replaced alone; leave it out of "
                "target_modules, or untie the model first"
            )
    chosen = remaining_targets(model, target_modules, modules_to_not_convert)
    if not chosen:
        by_default = "those inside of repeated blocks are taken where none are named; name yours, " if dense else ""
        raise ValueError(
            f"no module of {type(model).__name__} is left to compress with target_modules={target_modules!r} and "
            f"modules_to_not_convert={modules_to_not_convert!r}; {by_default}its linear layers end in "
            f"{sorted({leaf(name) for name in dense})}"
        )
    return chosen


def remaining_targets(
    model: nn.Module, target_modules: Patterns | None = None, modules_to_not_convert: Patterns | None = None
) -> list[str]:
    """The target layers that are dense now, in the model's order: of a compressed model those that were left so."""
    dense = dense_layers(model)
    if target_modules is None or target_modules == "all-linear":
        left_out = tied_modules(model, dense) | head_modules(model) | set(map(str, keep_in_fp32_names(model)))
        chosen = [
            name
            for name in dense
            if in_repeated_block(name)
            and left_out.isdisjoint((name, leaf(name)))
            and steers_nothing(name)
            and min(feature_sizes(dense[name])) >= NARROWEST
            and math.prod(feature_sizes(dense[name])) >= SMALLEST
        ]
    else:
        matched = match(target_modules, dense, "target_modules", must_match=False)
        chosen = [name for name in dense if name in matched]
    if modules_to_not_convert:
        excluded = match(modules_to_not_convert, dense, "modules_to_not_convert", must_match=False)
        chosen = [name for name in chosen if name not in excluded]
    return chosen


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside `torch.compile`, `DataParallel` and `DistributedDataParallel`.

    Its names are those of its checkpoints, and it has a model's methods and config.
    """
    while True:
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        elif "_orig_mod" in model._modules:
            # without the class, whose import takes the compiler's
            model = model.get_submodule("_orig_mod")
        else:
            return model


def refuse_adapters(model: nn.Module) -> None:
    """Raises ValueError if the model carries PEFT adapters: their matrices are dense layers like all others."""
    for name, module in model.named_modules():
        # by where it is defined, since a model without adapters is no reason to import PEFT
        if any(base.__module__.partition(".")[0] == "peft" for base in type(module).__mro__):
            raise ValueError(
                f"{name or 'the model'} is a {type(module).__name__} of PEFT, and compression would break its adapters "
                "up; take them in with merge_and_unload() or off with unload() first, or compress the base model and "
                "add adapters afterwards"
            )


def hits_of(patterns: Patterns, names: Iterable[str]) -> dict[str, set[str]]:
    """{pattern: the names that it matches}: a regular expression matches whole names, an entry of a list their ends."""
    if isinstance(patterns, str):
        return {patterns: {name for name in names if re.fullmatch(patterns, name)}}
    return {entry: {n for n in names if n == entry or n.endswith("." + entry)} for entry in patterns}


def match(patterns: Patterns, names: Iterable[str], what: str, must_match: bool = True) -> set[str]:
    """The names that a regular expression matches whole, or that equal or end in one of a list's entries."""
    hits = hits_of(patterns, names)
    empty = [pattern for pattern, found in hits.items() if not found]
    if must_match and empty:
        raise ValueError(
            f"{what} {empty} match no linear layer; this model's linear layers end in "
            f"{sorted({leaf(name) for name in names})}"
        )
    return set().union(*hits.values())


def override_for(name: str, overrides: dict[str, dict[str, Any]] | None) -> dict[str, Any]:
    """The values of the first pattern that an ending of `name` matches, else nothing."""
    return next((values for pattern, values in (overrides or {}).items() if is_overridden(name, pattern)), {})


def is_overridden(name: str, pattern: str) -> bool:
    """Whether the pattern of an override is about a layer of this name."""
    return re.fullmatch(rf"(.*\.)?({pattern})", name) is not None


def leaf(name: str) -> str:
    return name.rpartition(".")[2]


def in_repeated_block(name: str) -> bool:
    """Whether a component of the path is a number, as the members of an `nn.ModuleList` have it."""
    return any(part.isdigit() for part in name.split("."))


def steers_nothing(name: str) -> bool:
    """Whether a layer is neither a router or picker nor a part of one."""
    return (ROUTER_NAMES | PICKERS).isdisjoint(name.split("."))


def head_modules(model: nn.Module) -> set[str]:
    """The output embedding and its parts, by name, where the model says it has one; some have several, in a list."""
    get_head = getattr(model, "get_output_embeddings", None)
    head = get_head() if get_head else None
    parts = set() if head is None else set(head.modules())
    return {name for name, module in model.named_modules() if module in parts}


def keep_in_fp32_names(model: nn.Module) -> set[str]:
    """Leaf names that the model holds in float32 because their precision matters (T5's `wo`)."""
    names = getattr(model, "_keep_in_fp32_modules", None) or ()
    return set(names) | set(getattr(model, "_keep_in_fp32_modules_strict", None) or ())


def tied_modules(model: nn.Module, dense: dict[str, nn.Module]) -> set[str]:
    """Dense layers whose weight another module uses too: the same tensor, or declared so by the model."""
    # on the meta device ties are only declared, later they are visible as one tensor with several owners
    declared = {key.removesuffix(".weight") for key in getattr(model, "all_tied_weights_keys", None) or ()}
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name.removesuffix(".weight"))
    shared = {name for group in owners.values() if len(group) > 1 for name in group}
    return (declared | shared) & set(dense)
