"""From a config and a model to a plan."""

from __future__ import annotations

import logging
from typing import Any

from torch import nn

from hf_blr.config import BLRConfig
from hf_blr.dense import feature_sizes, is_transposed
from hf_blr.experts import ExpertsTensor, dense_layers, layer_named
from hf_blr.formats import PLAIN, Format, format_named
from hf_blr.linear import blr_modules
from hf_blr.plan.layers import LayerPlan, Plan
from hf_blr.plan.ranks import has_even_rows, in_multiples, lowered
from hf_blr.structures import (
    BLRSpec,
    Dense,
    as_block_pair,
    make_spec,
    max_rank,
    structure_named,
)
from hf_blr.targets import find_targets, hits_of, is_overridden, leaf, override_for
from hf_blr.unreached import warn_of_unreached

logger = logging.getLogger(__name__)


def resolve_plan(model: nn.Module, config: BLRConfig) -> Plan:
    """Every module that the config replaces in this model, with its sizes.

    Raises:
        ValueError: if the model is compressed already, a pattern matches nothing, or a module's sizes do not fit the
            structure; the message starts with the module's name.
    """
    compressed = list(blr_modules(model))
    if compressed:
        kind = type(model.get_submodule(compressed[0])).__name__
        raise ValueError(
            f"the model is compressed already: {compressed[0]} is a {kind}. To compress it again, make it dense first "
            "with hf_blr.to_dense(model)"
        )
    targets = find_targets(model, config.target_modules, config.modules_to_not_convert)
    by_default = config.target_modules is None or config.target_modules == "all-linear"
    plan: Plan = {}
    too_small: list[str] = []
    misfits: dict[str, ValueError] = {}
    for name in targets:
        module = layer_named(model, name)
        override = override_for(name, config.overrides)
        settings = config.settings_with(override)
        structure, rank, blocks = settings["structure"], settings["rank"], settings["num_blocks"]
        if by_default and rank is not None and rank > max_rank(structure, *feature_sizes(module), blocks):
            too_small.append(name)
        keeps_all = name in too_small or structure_named(structure).whole
        try:
            # a budget may leave any layer dense, and shall not find out after hours that the format cannot store it
            whole = dense_plan(module, config, override) if keeps_all or config.shares_budget else None
            if config.bits_per_weight is not None and not override:
                # until bits are shared out
                layer: LayerPlan | None = whole_layer(module, format_named("int8"))
            else:
                layer = whole if keeps_all else factored_plan(name, module, config, override)
        except ValueError as error:
            refused = ValueError(f"{name}: {error}")
            if not (by_default and too_narrow(module, settings)):
                raise refused from None
            misfits[name], layer = refused, None
        if layer is not None:
            plan[name] = layer
    if misfits and not plan:
        raise next(iter(misfits.values()))
    if misfits:
        logger.warning("%d modules stay dense, too narrow for their blocks: %s", len(misfits), ", ".join(misfits))
    if too_small:
        logger.warning(
            "%d modules stay dense, rank %s would not make them smaller: %s", len(too_small), config.rank, too_small
        )
    if not plan:
        raise ValueError(
            f"rank={config.rank} makes no module of this model smaller, and dense_format={config.dense_format!r} none "
            "of those that stay dense; use a lower rank, a ratio, or a dense_format of fewer bits"
        )
    warn_of_unmatched(config, targets, [*dense_layers(model)])
    warn_of_unreached(model)
    return plan


def warn_of_unmatched(config: BLRConfig, targets: list[str], dense: list[str]) -> None:
    """Says which patterns are about no layer: with a typing error, they would be passed over in silence."""
    kept_dense = hits_of(config.modules_to_not_convert or [], dense)
    unmatched = {
        "overrides": [p for p in config.overrides or {} if not any(is_overridden(name, p) for name in targets)],
        "modules_to_not_convert": [pattern for pattern, names in kept_dense.items() if not names],
    }
    for field, patterns in unmatched.items():
        if patterns:
            logger.warning(
                "%s of BLRConfig has patterns that match no layer: %s; the model's linear layers end in %s",
                field,
                patterns,
                sorted({leaf(name) for name in dense}),
            )


def too_narrow(module: nn.Module, settings: dict[str, Any]) -> bool:
    """Whether a layer has fewer features than blocks on a side, or a ratio buys it no rank at all."""
    spec, sizes, ratio = structure_named(settings["structure"]).spec, feature_sizes(module), settings["ratio"]
    blocks = as_block_pair(spec.default_blocks if settings["num_blocks"] is None else settings["num_blocks"])
    if any(size < count for size, count in zip(sizes, blocks, strict=True)):
        return True
    divided = all(size % count == 0 for size, count in zip(sizes, blocks, strict=True))
    return divided and ratio is not None and spec.rank_within(int(ratio * sizes[0] * sizes[1]), *sizes, blocks) < 1


def factored_plan(name: str, module: nn.Module, config: BLRConfig, override: dict[str, Any]) -> LayerPlan:
    """A layer as factors: of a ratio, with the largest rank that it buys and that the format's groups divide."""
    settings = config.settings_with(override)
    k, n = feature_sizes(module)
    spec = make_spec(in_features=k, out_features=n, **settings)
    storage = config.storage_of(spec.structure, override)
    if settings["ratio"] is not None:
        spec = lowered(spec, lambda lower: storage.misfit(lower) is None, 1)
        if config.rank_multiple is not None:
            spec = in_multiples(spec, config.rank_multiple, lambda lower: storage.misfit(lower) is None)
        if isinstance(module, ExpertsTensor):
            # products of many experts take rows that begin at such multiples; no more than an eighth is given for it
            least = spec.rank * 7 // 8
            spec = lowered(spec, lambda lower: storage.misfit(lower) is None and has_even_rows(lower), least)
    if storage.misfit(spec) is None and (waste := storage.waste(spec)) is not None:
        logger.warning("%s: stays in the plain format: %s", name, waste)
        storage = PLAIN
    return planned(module, spec, storage)


def planned(module: nn.Module, spec: BLRSpec, storage: Format) -> LayerPlan:
    """The plan of a dense layer, or of a tensor of experts, as this spec in this format."""
    if isinstance(module, ExpertsTensor):
        # a bias stays with the experts module
        return LayerPlan(spec, False, module.transposed, storage, module.num_experts)
    return LayerPlan(spec, module.bias is not None, is_transposed(module), storage)


def dense_plan(module: nn.Module, config: BLRConfig, override: dict[str, Any]) -> LayerPlan | None:
    """A layer that keeps its whole matrix in the config's `dense_format`; None where that leaves it as it is."""
    storage = config.storage_of(Dense.structure, override)
    return None if storage == PLAIN else whole_layer(module, storage)


def whole_layer(module: nn.Module, storage: Format) -> LayerPlan:
    """A layer that keeps its whole matrix in this format of fewer bits."""
    k, n = feature_sizes(module)
    return planned(module, Dense.whole(k, n), storage)
