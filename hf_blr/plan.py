"""From a config and a model to a plan: what each replaced module becomes."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from hf_blr.config import BLRConfig
from hf_blr.dense import feature_sizes, is_dense_linear, is_transposed, stored_weight
from hf_blr.experts import ExpertsLinear, ExpertsTensor, layer_named
from hf_blr.factorize.finite import check_finite
from hf_blr.formats import PLAIN, Format, format_named
from hf_blr.linear import BLRLinear, blr_modules
from hf_blr.structures import (
    FACTOR,
    BLRSpec,
    Dense,
    StoredTensor,
    as_block_pair,
    is_count,
    make_spec,
    max_rank,
    spec_from_dict,
    structure_named,
)
from hf_blr.targets import find_targets, override_for
from hf_blr.unreached import warn_of_unreached

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LayerPlan:
    """What one dense layer becomes: the factors' sizes, and what else must be known to build it back.

    Raises:
        ValueError: if the format cannot store a layer of these sizes.
    """

    spec: BLRSpec
    bias: bool
    transposed: bool
    storage: Format = PLAIN
    #: E, where the layer is a tensor of that many experts; 0 for a linear layer
    experts: int = 0

    def __post_init__(self) -> None:
        if self.experts and self.storage != PLAIN:
            raise ValueError(
                f"experts keep their factors in the plain format, got {self.storage.name}; name it in overrides, or "
                "leave them out with modules_to_not_convert"
            )
        problem = self.storage.misfit(self.spec) or self.storage.waste(self.spec)
        if problem is not None:
            raise ValueError(problem)
        if self.storage == PLAIN and structure_named(self.spec.structure).whole:
            raise ValueError(
                f"a layer of structure {self.spec.structure!r} is smaller in a format of fewer bits alone: name one, "
                "or leave the layer out of the plan"
            )

    @property
    def matrices(self) -> int:
        """How many matrices of the spec's sizes the layer holds: one, or one for each expert."""
        return max(self.experts, 1)

    def to_dict(self) -> dict[str, Any]:
        # the plain format goes without saying, also for a release that knows no other
        kept = {} if self.storage == PLAIN else {"format": self.storage.name, **self.storage.settings}
        many = {"experts": self.experts} if self.experts else {}
        return {**self.spec.to_dict(), "bias": self.bias, "transposed": self.transposed, **kept, **many}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> LayerPlan:
        """The inverse of `to_dict`. Raises ValueError for missing, unknown or wrongly typed entries."""
        if not isinstance(data, dict):
            raise ValueError(f"a layer's plan is a dict, got {type(data).__name__}")
        data = dict(data)
        try:
            bias, transposed = data.pop("bias"), data.pop("transposed")
        except KeyError as error:
            raise ValueError(f"a layer's plan needs the key {error}, got {sorted(data)}") from None
        for key, value in (("bias", bias), ("transposed", transposed)):
            if not isinstance(value, bool):
                raise ValueError(f"{key} must be True or False, got {value!r}")
        experts = data.pop("experts", 0)
        if not is_count(experts) or experts < 0:
            raise ValueError(f"experts must be a number of experts, got {experts!r}")
        storage = format_named(data.pop("format", PLAIN.name), data.pop("group_size", None))
        spec = spec_from_dict(data)
        highest = min(spec.in_features, spec.out_features)
        if spec.rank > highest:
            # of a damaged file, whose layers would fill the memory
            raise ValueError(f"rank must be at most {highest}, as that of any such matrix, got {spec.rank}")
        return cls(spec, bias, transposed, storage, experts)

    def stored(self) -> dict[str, tuple[tuple[int, ...], torch.dtype | None]]:
        """{state-dict key: shape, dtype} of all that the module keeps, its bias among it; None: the model's dtype."""
        bias = {"bias": StoredTensor((self.spec.out_features,), FACTOR)} if self.bias else {}
        tensors, leading = (self.storage.stored(self.spec) | bias).items(), (self.experts,) if self.experts else ()
        return {key: ((*leading, *shape), self.storage.dtype_of(kind, None)) for key, (shape, kind) in tensors}

    def build(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> BLRLinear:
        """The module, with fresh parameters (none on the meta device)."""
        if self.experts:
            return ExpertsLinear(self.spec, self.experts, self.transposed, device, dtype)
        return BLRLinear.from_spec(
            self.spec,
            bias=self.bias,
            transposed=self.transposed,
            device=device,
            dtype=dtype,
            storage=self.storage,
        )


Plan = dict[str, LayerPlan]


def plan_from_layers(layers: dict[str, dict]) -> Plan:
    """The plan stored in a config's `layers`. Raises ValueError that names the module."""
    plan = {}
    for name, data in layers.items():
        try:
            plan[name] = LayerPlan.from_dict(data)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    return plan


def layers_from_plan(plan: Plan) -> dict[str, dict]:
    """The JSON-ready form that `plan_from_layers` reads."""
    return {name: layer.to_dict() for name, layer in plan.items()}


def plan_in_place(model: nn.Module) -> Plan:
    """The plan of what is replaced in the model now, read off its BLR modules."""
    return {
        name: LayerPlan(
            module.spec,
            module.bias is not None,
            module.transposed,
            module.storage,
            module.num_experts if isinstance(module, ExpertsLinear) else 0,
        )
        for name, module in blr_modules(model).items()
    }


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
    left: list[str] = []
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
                # until bits are shared out, which is for layers: experts have no format of fewer bits
                is_layer = not isinstance(module, ExpertsTensor)
                layer: LayerPlan | None = whole_layer(module, format_named("int8")) if is_layer else None
                left += [] if is_layer else [name]
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
    if left:
        logger.warning("%d tensors of experts stay as they are, outside of the budget of bits: %s", len(left), left)
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
    rounded = [
        name
        for name, layer in plan.items()
        if layer.experts and config.storage_of(layer.spec.structure, override_for(name, config.overrides)) != PLAIN
    ]
    if rounded:
        logger.warning("%d tensors of experts keep their factors in the plain format: %s", len(rounded), rounded)
    warn_of_unreached(model)
    return plan


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
    if isinstance(module, ExpertsTensor):
        # their factors are kept in no other format
        return LayerPlan(spec, False, module.owner.is_transposed, PLAIN, module.num_experts)
    storage = config.storage_of(spec.structure, override)
    if settings["ratio"] is not None and storage.misfit(spec) is not None:
        lower = (replace(spec, rank=rank) for rank in range(spec.rank - 1, 0, -1))
        spec = next((candidate for candidate in lower if storage.misfit(candidate) is None), spec)
    if storage.misfit(spec) is None and (waste := storage.waste(spec)) is not None:
        logger.warning("%s: stays in the plain format: %s", name, waste)
        storage = PLAIN
    return LayerPlan(spec, module.bias is not None, is_transposed(module), storage)


def dense_plan(module: nn.Module, config: BLRConfig, override: dict[str, Any]) -> LayerPlan | None:
    """A layer that keeps its whole matrix in the config's `dense_format`; None where that leaves it as it is."""
    storage = config.storage_of(Dense.structure, override)
    if storage == PLAIN or isinstance(module, ExpertsTensor):
        return None
    return whole_layer(module, storage)


def whole_layer(module: nn.Module, storage: Format) -> LayerPlan:
    """A layer that keeps its whole matrix in this format of fewer bits."""
    k, n = feature_sizes(module)
    return LayerPlan(Dense(k, n, min(k, n)), module.bias is not None, is_transposed(module), storage)


def check_plan(model: nn.Module, plan: Plan) -> None:
    """Raises ValueError if a planned layer is not a dense layer of the planned size, or cannot be fitted."""
    placed = getattr(model, "hf_device_map", None) or {}
    if {"cpu", "disk"} & {str(device) for device in placed.values()} and len(set(placed.values())) > 1:
        raise ValueError(
            "the model is partly offloaded to the CPU or disk, where its layers cannot be replaced; load it on one "
            "device, or without device_map"
        )
    for name, layer in plan.items():
        module = layer_named(model, name)
        check_layer(name, module, layer)
        weight = stored_weight(module)
        if weight.is_meta:
            raise ValueError(f"{name}: the weight is on the meta device; load the model's weights first")
        check_finite(f"{name}.weight", weight, "the checkpoint is damaged or overflowed its dtype")


def check_layer(name: str, module: nn.Module, layer: LayerPlan, remedy: str = "") -> None:
    """Raises ValueError unless the module is a dense layer of the kind and sizes that the plan was made for."""
    sizes = layer.spec.in_features, layer.spec.out_features
    planned = layer_in_words(sizes, layer.bias, layer.transposed, layer.experts)
    found = f"a {type(module).__name__}"
    if isinstance(module, ExpertsTensor):
        found = layer_in_words(feature_sizes(module), False, module.owner.is_transposed, module.num_experts)
    elif is_dense_linear(module):
        found = layer_in_words(feature_sizes(module), module.bias is not None, is_transposed(module))
    if found != planned:
        raise ValueError(f"{name}: the plan says {planned}, the model has {found}{remedy and f'; {remedy}'}")


def layer_in_words(sizes: tuple[int, int], bias: bool, transposed: bool, experts: int = 0) -> str:
    if experts:
        stored = ", stored transposed" if transposed else ""
        return f"{experts} experts of {sizes[0]} -> {sizes[1]} features{stored}"
    kind = "a Conv1D" if transposed else "a linear layer"
    return f"{kind} of {sizes[0]} -> {sizes[1]} features {'with' if bias else 'without'} a bias"
